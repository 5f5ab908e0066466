"""What the benchmarks of steps share: the command line, turns and their ratios, memory."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from benchmarks.markdown import table_of

Turn = Mapping[Hashable, float]  # step -> seconds


@dataclass(frozen=True)
class Case:
    """A network, the side of its images in pixels, and the batch."""

    network: str
    size: int
    batch: int


def clock() -> float:
    """Wall-clock seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call, the GPU's work included."""
    start = clock()
    function()
    return clock() - start


def in_turns(steps: Mapping[Any, Callable[[], Any]], rounds: int) -> list[Turn]:
    """Seconds of every step, all one after the other in each round; after two calls each, which compile."""
    for step in steps.values():
        step()
        step()
    return [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]


def ratio(turns: Iterable[Turn], one: Hashable, other: Hashable) -> float:
    """Median over the rounds of `one` divided by `other`."""
    return round(statistics.median(turn[one] / turn[other] for turn in turns), 3)


def milliseconds(turns: Iterable[Turn], one: Hashable) -> float:
    """Median over the rounds."""
    return round(1000 * statistics.median(turn[one] for turn in turns), 1)


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most memory that a step's tensors take at once, beside what there was before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    changes = [
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(accumulate(changes), default=0)


def compare(
    modes: Mapping[str, Mapping[str, Callable[[], Any]]], base: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """A line for each mode: `base` in milliseconds, each other step over `base`, and each compiled step over the eager one.

    The most memory that each step takes is in megabytes.
    """
    turns = in_turns(
        {(mode, name): step for mode, steps in modes.items() for name, step in steps.items()}, rounds
    )
    for mode, steps in modes.items():
        line: dict[str, Any] = {"mode": mode, f"{base}_ms": milliseconds(turns, (mode, base))}
        line |= {
            f"{name} / {base}": ratio(turns, (mode, name), (mode, base)) for name in steps if name != base
        }
        line |= {f"{name}_mb": round(peak_bytes(step) / 1e6, 1) for name, step in steps.items()}
        if mode == "compiled" and "eager" in modes:
            line |= {f"{name} / eager": ratio(turns, (mode, name), ("eager", name)) for name in steps}
        yield line


def main(
    doc: str | None,
    cases: Mapping[str, Mapping[str, Case]],
    measure: Callable[[Any, str, argparse.Namespace], Iterable[dict[str, Any]]],
    rounds: int = 7,
    training: bool = True,
) -> None:
    """Measures the cases that the command line asks for: prints the lines of each as JSON, then all as a table.

    Args:
        doc: what `--help` says.
        cases: device (`cpu`, `cuda`) -> name -> case.
        measure: (case, device, options) -> lines; options are `rounds`, and of training `mode` and `channels_last`.
        rounds: by default.
        training: whether steps of training are measured, which may be compiled and have two layouts.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=cases[device], nargs="+", default=list(cases[device]))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    if training:
        parser.add_argument("--mode", choices=("eager", "compiled"), nargs="+", default=("eager", "compiled"))
        parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for name in options.case:
        torch.compiler.reset()
        case = cases[device][name]
        for line in measure(case, device, options):
            lines.append(
                {"case": name, "batch": case.batch, "device": device, "threads": options.threads} | line
            )
            print(json.dumps(lines[-1]), flush=True)
    print("\n" + table_of(lines))
