"""Cost of a training step in the B-cosification of a CLIP image tower, relative to a plain student.

    python -m benchmarks.clip [--case RN50-112 ...] [--mode eager compiled] [--rounds 7]

A step is the teacher's forward pass, and the student's forward and backward pass with the SigLIP loss,
without an optimiser step. The steps take turns:

- `plain`: the student has the architecture of the teacher;
- `bcos`: the student is the B-cosified tower;
- `teacher`: the teacher's forward pass only.

Prints one line of JSON per case and mode, then a table: ratios to `plain` of the same mode and of compiled to
eager steps, as medians over the rounds, and the peak memory of a step's tensors, without parameters. Needs
torch and open_clip. With a GPU, it runs in bfloat16 at 224 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, compare, main
from benchmarks.step import keep_small_features
from pipelines.methods import ClipBcosification
from pipelines.models import ModelSpec, assemble
from pipelines.params import ClipParams, OptimiserParams, TrainingParams
from pipelines.training.objective import build_objective, memory_format
from pipelines.training.step import in_memory_format

CASES = {
    "cpu": {"RN50-112": Case("open_clip:RN50", 112, 16), "ViT-B-32-112": Case("open_clip:ViT-B-32", 112, 32)},
    "cuda": {
        "RN50-224": Case("open_clip:RN50", 224, 128),
        "ViT-B-32-224": Case("open_clip:ViT-B-32", 224, 256),
    },
}


def steps(case: Case, device: str, compiled: bool, channels_last: bool) -> dict[str, Callable[[], Any]]:
    """The steps to compare, each with its own student."""
    training = TrainingParams(workers=0, compile=compiled, channels_last=channels_last)
    params = ClipParams(optim=OptimiserParams(epochs=1, batch_size=case.batch, lr=1e-4))
    plain = ModelSpec(
        case.network, (), case.size, "conventional", "embedding", options={"image_size": case.size}
    )
    torch.manual_seed(0)
    batch = {"image": torch.rand(case.batch, 3, case.size, case.size, device=device)}
    found: dict[str, Callable[[], Any]] = {}
    for name in ("plain", "bcos"):
        torch.manual_seed(0)
        teacher = assemble(plain).to(device)
        student = assemble(plain)
        if name == "bcos":
            bcos = ModelSpec(**{**vars(plain), "kind": "bcos", "design": params.design()})
            student = keep_small_features(assemble(bcos, student.get_submodule("network")))
        method = ClipBcosification(student.to(device).train(), teacher, params)
        objective = build_objective(method, training)
        found[name] = partial(step, method, objective, batch, device, memory_format(training))
        if name == "plain":
            found["teacher"] = partial(prepare, method, batch, device)
    return found


def prepare(method: ClipBcosification, batch: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Runs the teacher's forward pass; returns the batch that the loss takes."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        prepared = method.prepare(batch)
    return prepared | {
        "all_target": prepared["target"],
        "row": torch.arange(len(prepared["target"]), device=device),
    }


def step(
    method: ClipBcosification,
    objective: nn.Module,
    batch: dict[str, Any],
    device: str,
    layout: torch.memory_format,
) -> None:
    """Runs the teacher's forward pass, and the student's forward and backward pass."""
    method.module.zero_grad(set_to_none=True)
    prepared = {
        name: in_memory_format(value, layout) for name, value in prepare(method, batch, device).items()
    }
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        loss = objective(prepared)["loss"]
    loss.backward()


def measure(case: Case, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures one case; one line of figures per mode."""
    modes = {mode: steps(case, device, mode == "compiled", options.channels_last) for mode in options.mode}
    yield from compare(modes, "plain", options.rounds)


if __name__ == "__main__":
    main(__doc__, CASES, measure)
