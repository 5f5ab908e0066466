"""Cost of a step of the B-cosification of an image tower against the same step with the plain tower as the student.

    python -m benchmarks.clip [--case RN50-112 ...] [--mode eager compiled] [--rounds 7]

Both steps are the teacher's forward pass, and forward and backward pass of the student with SigLIP's loss, no optimiser: `plain`
with a student that is built like the teacher, `bcos` with the B-cosified tower. `teacher` is the teacher's forward pass alone.
All take turns in one run; printed are medians over the rounds of the ratio to `plain` of the same mode, of compiled to eager
steps, and the most memory that tensors take in a step, parameters left out. One line of JSON a case and mode, then a table. Needs
torch and open_clip; on a GPU, where there is one, in bfloat16 at 224 pixels.
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
from pipelines.params import ClipParams, TrainingParams
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
    """The steps that are compared, each with a student of its own."""
    training = TrainingParams(workers=0, compile=compiled, channels_last=channels_last)
    params = ClipParams(epochs=1, batch_size=case.batch, lr=1e-4)
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
    """What the loss takes: the teacher's forward pass."""
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
    """The teacher's forward pass, and the student's forward and backward pass."""
    method.module.zero_grad(set_to_none=True)
    prepared = {
        name: in_memory_format(value, layout) for name, value in prepare(method, batch, device).items()
    }
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        loss = objective(prepared)["loss"]
    loss.backward()


def measure(case: Case, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each mode."""
    modes = {mode: steps(case, device, mode == "compiled", options.channels_last) for mode in options.mode}
    yield from compare(modes, "plain", options.rounds)


if __name__ == "__main__":
    main(__doc__, CASES, measure)
