"""Cost of a guided training step, and of explaining each pair of an image and one of its classes.

    python -m benchmarks.guidance [--case resnet18-112 ...] [--mode eager compiled] [--rounds 7]

Steps: forward and backward pass without an optimiser step, of classification (`plain`) and of classification
with the energy loss at the input (`guided`). They take turns. Prints ratios to `plain` of the same mode and
of compiled to eager steps, as medians over the rounds.

Pairs: 64 images with 1 to 5 classes each make 192 pairs. Compares `explain_pairs` on all images with one
backward pass per pair through the graphs of batches of 8, in time and in the maps.

With a GPU, cases have the image sizes of ImageNet, and steps run in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distillation import stepper
from benchmarks.harness import Case, compare, in_turns, main, ratio
from benchmarks.step import keep_small_features
from pipelines.attribution import explain, explain_pairs
from pipelines.bcos import add_inverse, bcosify, explanation_mode
from pipelines.bcos.precision import exact_float32
from pipelines.methods import Guidance
from pipelines.models import build
from pipelines.params import GuidanceParams, OptimiserParams, TrainingParams
from pipelines.training.objective import build_objective, memory_format

CLASSES = 20
LABELS = (1, 2, 3, 5, 2, 4, 3, 4)  # classes per image of eight images: 24 pairs
CASES = {
    "cpu": {"resnet18-112": Case("resnet18", 112, 16)},
    "cuda": {"resnet50-224": Case("resnet50", 224, 64)},
}


def network(case: Case, device: str) -> nn.Module:
    """The B-cos network of a case."""
    torch.manual_seed(0)
    return keep_small_features(bcosify(build(case.network, num_classes=CLASSES))).to(device)


def images_of(case: Case, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, H, W) and their classes (N, K) of {0, 1}; LABELS repeats every eight images."""
    present = torch.zeros(count, CLASSES)
    for row in range(count):
        present[row, torch.randperm(CLASSES)[: LABELS[row % len(LABELS)]]] = 1
    return torch.rand(count, 3, case.size, case.size, device=device), present.to(device)


def steps(case: Case, device: str, compiled: bool, channels_last: bool) -> dict[str, Callable[[], None]]:
    """The steps to compare, each with its own network."""
    images, labels = images_of(case, case.batch, device)
    training = TrainingParams(workers=0, compile=compiled, channels_last=channels_last)
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * case.size
    pairs = labels.cpu().nonzero().float()  # (P, 2): image and class
    boxes = torch.cat([pairs, box.expand(len(pairs), 4)], dim=1)
    batch = {
        "key": [str(row) for row in range(case.batch)],
        "image": images,
        "labels": labels,
        "boxes": boxes,
    }
    found = {}
    for name, weight in (("plain", 0.0), ("guided", 0.01)):
        params = GuidanceParams(
            optim=OptimiserParams(epochs=1, batch_size=case.batch, lr=0.1), localisation_weight=weight
        )
        method = Guidance(network(case, device).train(), "multilabel", CLASSES, params)
        found[name] = stepper(
            method, build_objective(method, training), batch, device, memory_format(training), 1
        )
    return found


def pair_by_pair(model: nn.Module, images: Tensor, present: Tensor) -> Tensor:
    """Maps (P, H, W), with one backward pass per pair through the graphs of batches of eight images."""
    found = []
    for some, of_them in zip(images.split(8), present.split(8), strict=True):
        some = some.clone().requires_grad_()
        with explanation_mode(model):
            logits = model(some)
            for row, label in of_them.nonzero().tolist():
                (gradient,) = torch.autograd.grad(logits[row, label], some, retain_graph=True)
                found.append((some[row] * gradient[row]).sum(0).detach())
    return torch.stack(found)


@exact_float32()
def measure_pairs(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Time and maps of `explain_pairs` relative to `pair_by_pair`, as one line of figures."""
    model = network(case, device).eval().requires_grad_(False)
    images, present = images_of(case, 64, device)
    images, present = add_inverse(images), present.bool()
    ways: dict[str, Callable[[], Any]] = {
        "pair by pair": partial(pair_by_pair, model, images, present),
        "all pairs": lambda: explain_pairs(partial(explain, model), images, present)[1],
    }
    one, other = (way() for way in ways.values())
    speedup = ratio(in_turns(ways, rounds), "pair by pair", "all pairs")
    difference = float((one - other).abs().max() / one.abs().max())
    return {"pairs": int(present.sum()), "speedup": speedup, "difference": float(f"{difference:.1e}")}


def measure(case: Case, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures one case; one line of figures per mode, and one for the pairs."""
    modes = {mode: steps(case, device, mode == "compiled", options.channels_last) for mode in options.mode}
    yield from compare(modes, "plain", options.rounds)
    yield measure_pairs(case, device, options.rounds)


if __name__ == "__main__":
    main(__doc__, CASES, measure)
