"""Cost of a B-cos network against the plain one it was made from: training step, inference, explanation.

    python -m tests.benchmarks.step [--case resnet20-32] [--threads 2] [--rounds 7]

Prints one line of JSON a case: milliseconds of the plain network, and for each measure the ratio B-cos / plain (medians over
rounds in which both take turns, so that what else runs on the machine strikes both alike). `dynamic_weights` is held against the
plain network's forward pass and input gradient. Runs on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipelines.bcos import bcosify, dynamic_weights
from pipelines.models import ConventionalNetwork, build

CASES = {"resnet20-32": ("resnet20", 32, 64), "resnet18-112": ("resnet18", 112, 16), "resnet50-112": ("resnet50", 112, 8)}


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward, backward, no optimiser."""
    model.train().zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(images), labels).backward()


@torch.no_grad()
def infer(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward alone."""
    model.eval()(images)


def explain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The gradient of each label's logit with respect to the input; of a B-cos network its dynamic weights."""
    model.eval()
    if not isinstance(model, ConventionalNetwork):
        dynamic_weights(model, images, labels)
        return
    images = images.detach().requires_grad_()
    torch.autograd.grad(model(images).gather(1, labels[:, None]).sum(), images)


MEASURES = {"training_step": train_step, "inference": infer, "dynamic_weights": explain}


def seconds(function: Callable[..., None], *arguments: object) -> float:
    """Time of one call, the GPU's work included."""
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in options.case or CASES:
        network, size, batch = CASES[name]
        torch.manual_seed(0)
        source = build(network, num_classes=10)
        plain, bcos = ConventionalNetwork(source).to(device), bcosify(source).to(device)
        images, labels = torch.rand(batch, 6, size, size, device=device), torch.randint(10, (batch,), device=device)
        found: dict[str, object] = {"case": name, "batch": batch, "device": device, "threads": options.threads}
        for measure, function in MEASURES.items():
            turns = [[seconds(function, model, images, labels) for model in (plain, bcos)] for _ in range(options.rounds + 1)][1:]
            found[f"{measure}_plain_ms"] = round(1000 * statistics.median(turn[0] for turn in turns), 1)
            found[f"{measure}_ratio"] = round(statistics.median(turn[1] / turn[0] for turn in turns), 3)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
