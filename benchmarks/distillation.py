"""Cost of a step of e²KD against one of plain distillation, both with a live teacher; and of both compiled.

    python -m benchmarks.distillation [--case resnet18-112 ...] [--rounds 7] [--json FILE]

Measures a step's forward and backward pass, the teacher's share included, no optimiser: of `kd` (plain distillation), `live`
(e²KD with a live teacher), `frozen` (its logits and maps at hand) and `every 16` (16 steps, the first of them with explanations),
each eager and compiled. All take turns in one run; printed are medians over the rounds of the ratio to `kd` of the same mode, of
compiled to eager e²KD, and the most memory that tensors take in a step, parameters left out. One line of JSON a case, then a
table. On a GPU, where there is one, in bfloat16 at the sizes of ImageNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pipelines  # noqa: F401  (first: it says how threads wait)

import torch  # isort: skip
from torch import Tensor, nn

from benchmarks.harness import MODES, in_turns, main, milliseconds, ratio
from benchmarks.step import keep_small_features
from pipelines.attribution import comparable_explainers
from pipelines.bcos import bcosify
from pipelines.methods import E2KD
from pipelines.models import ModelSpec, build
from pipelines.params import DistillationParams, TrainingParams
from pipelines.training.loop import in_memory_format
from pipelines.training.objective import build_objective, memory_format

CLASSES = tuple(map(str, range(20)))
EVERY = 16


@dataclass(frozen=True)
class Case:
    """Teacher, student, the side of their images in pixels, and the batch."""

    teacher: str
    student: str
    size: int
    batch: int


CASES = {
    "cpu": {
        "resnet18-112": Case("resnet34", "resnet18", 112, 16),
        "resnet18-112-same": Case("resnet18", "resnet18", 112, 16),
        "resnet20-32": Case("resnet32", "resnet20", 32, 64),
    },
    "cuda": {"resnet18-224": Case("resnet34", "resnet18", 224, 128)},
}


def steps(case: Case, device: str, compiled: bool, channels_last: bool) -> dict[str, Callable[[], None]]:
    """The steps that are compared, each on a student of its own."""
    torch.manual_seed(0)
    teacher = keep_small_features(bcosify(build(case.teacher, num_classes=len(CLASSES)))).to(device)
    spec = ModelSpec(case.student, CLASSES, case.size, kind="bcos")
    training = TrainingParams(workers=0, compile=compiled, channels_last=channels_last)
    batch = {"image": torch.rand(case.batch, 3, case.size, case.size, device=device)}
    found = {}
    for name, weight, every in (("kd", 0.0, 1), ("live", 1.0, 1), ("frozen", 1.0, 1), (f"every {EVERY}", 1.0, EVERY)):
        torch.manual_seed(1)
        student = bcosify(build(case.student, num_classes=len(CLASSES)), normalize_weight=True)
        student = keep_small_features(student).to(device).train()
        source = "frozen" if name == "frozen" else "live"
        params = DistillationParams(
            epochs=1, batch_size=case.batch, lr=0.1, explanation_weight=weight, explain_every=every, explanations=source
        )
        probe = torch.full((1, 6, case.size, case.size), 0.5, device=device)
        explain = comparable_explainers(student, teacher, probe, held=True) if weight else None
        method = E2KD(student, spec, teacher, params, explain)
        objective = build_objective(method, training)
        stored = live_maps(method, batch) if name == "frozen" else {}
        found[name] = stepper(method, objective, batch | stored, device, memory_format(training), every)
    return found


def live_maps(method: E2KD, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The teacher's logits and maps of a batch, as they come from storage."""
    method.params, kept = method.params.model_copy(update={"explanations": "live"}), method.params
    prepared = method.prepare(batch)
    method.params = kept
    return {"teacher_logits": prepared["teacher_logits"], "teacher_maps": prepared["teacher_maps"]}


def stepper(
    method: E2KD, objective: nn.Module, batch: dict[str, Any], device: str, layout: torch.memory_format, count: int
) -> Callable[[], None]:
    """`count` steps: what the teacher gives, forward and backward pass."""

    def run() -> None:
        for number in range(count):
            method.module.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                prepared = method.prepare({**batch, "step": number}).items()
                loss = objective({name: in_memory_format(value, layout) for name, value in prepared})["loss"]
            loss.backward()

    return run


def peak_bytes(step: Callable[[], None]) -> int:
    """The most memory that a step's tensors take at once, beside what there was before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(changes), default=0)


def measure(name: str, case: Case, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The line of the report."""
    modes = {mode: steps(case, device, mode == "compiled", options.channels_last) for mode in options.mode}
    found: dict[str, Any] = {"case": name, "batch": case.batch, "device": device, "threads": torch.get_num_threads()}
    turns = in_turns(modes, options.rounds)
    for mode in modes:
        for turn in turns:
            turn[mode, f"every {EVERY}"] /= EVERY
        found[f"{mode}_kd_ms"] = milliseconds(turns, (mode, "kd"))
        for key in ("live", "frozen", f"every {EVERY}"):
            found[f"{mode}_{key}"] = ratio(turns, (mode, key), (mode, "kd"))
        for key in ("kd", "live", "frozen"):
            found[f"{mode}_{key}_mb"] = round(peak_bytes(modes[mode][key]) / 1e6, 1)
    if len(modes) == 2:
        for key in ("kd", "live", "frozen"):
            found[f"compiled_to_eager_{key}"] = ratio(turns, ("compiled", key), ("eager", key))
    yield found


def table(lines: list[dict[str, Any]]) -> str:
    """The ratios as markdown."""
    head = ["case", "mode", "live", "frozen", f"every {EVERY}", "kd ms", "peak MB: kd", "live", "frozen", "live compiled / eager"]
    rows = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for line in lines:
        for mode in (mode for mode in MODES if f"{mode}_kd_ms" in line):
            ratios = [line[f"{mode}_{key}"] for key in ("live", "frozen", f"every {EVERY}")]
            memory = [line[f"{mode}_{key}_mb"] for key in ("kd", "live", "frozen")]
            last = line.get("compiled_to_eager_live", "") if mode == "compiled" else ""
            cells = [line["case"], mode, *ratios, line[f"{mode}_kd_ms"], *memory, last]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main(__doc__, CASES, measure, table)
