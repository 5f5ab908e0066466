"""What the benchmarks of steps share: the command line, turns, and their ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

Steps = Mapping[str, Callable[[], Any]]
Turn = dict[tuple[str, str], float]  # (mode, step) -> seconds
MODES = ("eager", "compiled")


def clock() -> float:
    """Wall-clock seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall-clock seconds of a call, the GPU's work included."""
    start = clock()
    function(*arguments)
    return clock() - start


def in_turns(modes: Mapping[str, Steps], rounds: int) -> list[Turn]:
    """Seconds of every step of every mode, all one after the other in each round; after two calls each, which compile."""
    for steps in modes.values():
        for step in steps.values():
            step()
            step()
    return [{(mode, name): seconds(modes[mode][name]) for mode in modes for name in modes[mode]} for _ in range(rounds)]


def ratio(turns: Iterable[Turn], one: tuple[str, str], other: tuple[str, str]) -> float:
    """Median over the rounds of `one` divided by `other`."""
    return round(statistics.median(turn[one] / turn[other] for turn in turns), 3)


def milliseconds(turns: Iterable[Turn], one: tuple[str, str]) -> float:
    """Median over the rounds."""
    return round(1000 * statistics.median(turn[one] for turn in turns), 1)


def main(
    doc: str | None,
    cases: Mapping[str, Mapping[str, Any]],
    measure: Callable[[str, Any, str, argparse.Namespace], Iterable[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
    rounds: int = 7,
) -> None:
    """Measures the cases that the command line asks for: prints the lines of each as JSON, then all as a table.

    Args:
        doc: what `--help` says.
        cases: device (`cpu`, `cuda`) -> name -> case.
        measure: (name, case, device, options) -> lines; options are `mode`, `rounds` and `channels_last`.
        table: lines -> markdown.
        rounds: by default.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=cases[device], nargs="+", default=list(cases[device]))
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="where the lines go too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for name in options.case:
        torch.compiler.reset()
        for line in measure(name, cases[device][name], device, options):
            lines.append(line)
            print(json.dumps(line), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n" + table(lines))
