"""Shared parts of the benchmarks of steps: command line, timing in turns, ratios and memory.

Other processes disturb timings. Steps that are compared therefore take turns: each round runs every step
once, and ratios are medians over the rounds.
"""

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

Turn = Mapping[Hashable, float]  # one round: step -> seconds


@dataclass(frozen=True)
class Case:
    """A network, the side of its images in pixels, and the batch size."""

    network: str
    size: int
    batch: int


def clock() -> float:
    """Wall-clock time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call, including the GPU's work."""
    start = clock()
    function()
    return clock() - start


def in_turns(steps: Mapping[Any, Callable[[], Any]], rounds: int) -> list[Turn]:
    """Seconds per step of each round, in which all steps run once; before, each runs twice to compile."""
    for step in steps.values():
        step()
        step()
    return [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]


def ratio(turns: Iterable[Turn], one: Hashable, other: Hashable) -> float:
    """Median over the rounds of the time of `one` divided by that of `other`."""
    return round(statistics.median(turn[one] / turn[other] for turn in turns), 3)


def milliseconds(turns: Iterable[Turn], one: Hashable) -> float:
    """Median time of `one` over the rounds, in milliseconds."""
    return round(1000 * statistics.median(turn[one] for turn in turns), 1)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Peak memory of a step's tensors in bytes, without the memory allocated before the step."""
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
    """Measures the steps of each mode (`eager`, `compiled`) in turns; one line of figures per mode.

    A line has the milliseconds of `base`, the ratio of every other step to `base`, the ratio of every
    compiled step to the same eager step, and the peak memory of every step in megabytes.
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
    """Measures the cases chosen on the command line; prints each line as JSON, and all lines as a table.

    Args:
        doc: text of `--help`.
        cases: device (`cpu`, `cuda`) -> name -> case.
        measure: (case, device, options) -> lines of figures. Options are `rounds` and, with `training`,
            `mode` and `channels_last`.
        rounds: default number of rounds.
        training: add the options `--mode` and `--channels-last` of training steps.
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
