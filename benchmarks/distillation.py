"""Cost of a training step of e²KD, relative to plain distillation.

    python -m benchmarks.distillation [--case resnet18-112 ...] [--mode eager compiled] [--rounds 7]

A step is the student's forward and backward pass and the teacher's share, without an optimiser step. The
steps take turns:

- `kd`: plain distillation with a live teacher;
- `live`: e²KD with a live teacher;
- `frozen`: e²KD with stored logits and maps of the teacher;
- `every 16`: the mean of 16 steps, of which the first matches explanations.

Prints one line of JSON per case and mode, then a table: ratios to `kd` of the same mode and of compiled to
eager steps, as medians over the rounds, and the peak memory of a step's tensors, without parameters. With a
GPU, it runs in bfloat16 at the image sizes of ImageNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Case, compare, main
from benchmarks.step import keep_small_features
from pipelines.attribution import comparable_explainers
from pipelines.bcos import bcosify
from pipelines.methods import E2KD
from pipelines.methods.method import Method
from pipelines.models import ModelSpec, build
from pipelines.params import DistillationParams, OptimiserParams, TrainingParams
from pipelines.training.objective import build_objective, memory_format
from pipelines.training.step import in_memory_format

CLASSES = tuple(map(str, range(20)))
EVERY = 16


@dataclass(frozen=True)
class TaughtCase(Case):
    """A student, which is the network of the case, and its teacher."""

    teacher: str


CASES = {
    "cpu": {
        "resnet18-112": TaughtCase("resnet18", 112, 16, "resnet34"),
        "resnet20-32": TaughtCase("resnet20", 32, 64, "resnet32"),
    },
    "cuda": {"resnet18-224": TaughtCase("resnet18", 224, 128, "resnet34")},
}


def steps(
    case: TaughtCase, device: str, compiled: bool, channels_last: bool
) -> dict[str, Callable[[], None]]:
    """The steps to compare, each with its own student."""
    torch.manual_seed(0)
    teacher = keep_small_features(bcosify(build(case.teacher, num_classes=len(CLASSES)))).to(device)
    spec = ModelSpec(case.network, CLASSES, case.size, kind="bcos")
    training = TrainingParams(workers=0, compile=compiled, channels_last=channels_last)
    batch = {"image": torch.rand(case.batch, 3, case.size, case.size, device=device)}
    found = {}
    for name, weight, every in (
        ("kd", 0.0, 1),
        ("live", 1.0, 1),
        ("frozen", 1.0, 1),
        (f"every {EVERY}", 1.0, EVERY),
    ):
        torch.manual_seed(1)
        network = bcosify(build(case.network, num_classes=len(CLASSES)), normalize_weight=True)
        student = keep_small_features(network).to(device).train()
        params = DistillationParams(
            optim=OptimiserParams(epochs=1, batch_size=case.batch, lr=0.1),
            explanation_weight=weight,
            explain_every=every,
            explanations="frozen" if name == "frozen" else "live",
        )
        probe = torch.full((1, 6, case.size, case.size), 0.5, device=device)
        explain = comparable_explainers(student, teacher, probe, held=True) if weight else None
        method = E2KD(student, spec, teacher, params, explain)
        objective = build_objective(method, training)
        stored = {}
        if name == "frozen":
            live = E2KD(student, spec, teacher, params.model_copy(update={"explanations": "live"}), explain)
            stored = {key: value for key, value in live.prepare(batch).items() if key.startswith("teacher_")}
        found[name] = stepper(method, objective, batch | stored, device, memory_format(training), every)
    return found


def stepper(
    method: Method,
    objective: nn.Module,
    batch: dict[str, Any],
    device: str,
    layout: torch.memory_format,
    count: int,
) -> Callable[[], None]:
    """A function that runs `count` steps of `method`: the teacher's share, forward and backward pass."""

    def run() -> None:
        for number in range(count):
            method.module.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                prepared = method.prepare({**batch, "step": number}).items()
                loss = objective({name: in_memory_format(value, layout) for name, value in prepared})["loss"]
            loss.backward()

    return run


def measure(case: TaughtCase, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures one case; one line of figures per mode."""
    modes = {mode: steps(case, device, mode == "compiled", options.channels_last) for mode in options.mode}
    for line in compare(modes, "kd", options.rounds):
        yield line | {f"every {EVERY} / kd": round(line[f"every {EVERY} / kd"] / EVERY, 3)}


if __name__ == "__main__":
    main(__doc__, CASES, measure)
