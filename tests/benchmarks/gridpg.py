"""Speed of the batched grid pointing game against a loop over grids and classes; both give the same scores.

    python -m tests.benchmarks.gridpg [--case resnet20-32] [--method bcos] [--repeats 3]

Prints one line of JSON a case: seconds a grid of both, their ratio, the largest difference of scores. The plain loop makes one
forward and one backward pass for each class of each grid.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipelines.attribution import attribute, attribute_many
from pipelines.bcos import add_inverse, bcosify
from pipelines.metrics.grid import grid_pointing_game
from pipelines.models import ConventionalNetwork, build


@dataclass(frozen=True)
class Case:
    """A network, the size of its images, and the grids to explain."""

    network: str
    size: int
    n: int
    grids: int
    batch: int
    smooth: int


CASES = {
    "resnet20-32-2x2": Case("resnet20", 32, 2, 32, 16, 3),
    "resnet20-32-3x3": Case("resnet20", 32, 3, 16, 16, 3),
    "resnet18-224-2x2": Case("resnet18", 224, 2, 4, 4, 15),
    "resnet18-224-3x3": Case("resnet18", 224, 3, 2, 2, 15),
}


def model_of(case: Case, method: str) -> nn.Module:
    """The network at random weights, its norms' statistics set from a batch, B-cosified for `bcos`."""
    network = build(case.network, num_classes=20)
    model = bcosify(network) if method.startswith("bcos") else ConventionalNetwork(network)
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0  # type: ignore[assignment]  # the statistics of the last batch
    model.train()
    with torch.no_grad():
        model(add_inverse(torch.rand(8, 3, case.size, case.size)))
    return model.eval()


def loop(model: nn.Module, method: str, smooth: int, grids: Tensor, classes: Tensor) -> Tensor:
    """The game, one class of one grid at a time: (G, n²)."""
    scores = torch.zeros(classes.shape)
    n = round(classes.shape[1] ** 0.5)
    for i, grid in enumerate(grids):
        for j, target in enumerate(classes[i]):
            attribution = attribute(model, grid[None], target[None], method=method)
            positive = nn.functional.avg_pool2d(attribution, smooth, 1, smooth // 2)[0].clamp_min(0)
            side = len(positive) // n
            cell = positive[j // n * side : (j // n + 1) * side, j % n * side : (j % n + 1) * side]
            scores[i, j] = cell.sum() / positive.sum() if positive.sum() > 0 else 0.0
    return scores


def batched(model: nn.Module, method: str, case: Case, grids: Tensor, classes: Tensor) -> Tensor:
    """The game as the project plays it: (G, n²)."""
    play = partial(grid_pointing_game, partial(attribute_many, model, method=method), smooth=case.smooth)
    return torch.cat([play(*batch) for batch in zip(grids.split(case.batch), classes.split(case.batch), strict=True)])


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Least seconds of `repeats` runs, and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def measure(name: str, method: str, repeats: int) -> dict[str, object]:
    """One line of the report."""
    case = CASES[name]
    torch.manual_seed(0)
    model = model_of(case, method)
    side = case.n * case.size
    grids = add_inverse(torch.rand(case.grids, 3, side, side))
    classes = torch.stack([torch.randperm(20)[: case.n**2] for _ in range(case.grids)])
    batched(model, method, case, grids[:1], classes[:1])  # warm-up
    fast, fast_scores = timed(lambda: batched(model, method, case, grids, classes), repeats)
    slow, slow_scores = timed(lambda: loop(model, method, case.smooth, grids, classes), max(1, repeats - 1))
    return {
        "case": name,
        "method": method,
        "threads": torch.get_num_threads(),
        "loop_seconds_per_grid": round(slow / case.grids, 4),
        "batched_seconds_per_grid": round(fast / case.grids, 4),
        "ratio": round(slow / fast, 2),
        "largest_difference": float((fast_scores - slow_scores).abs().max()),
    }


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), action="append")
    parser.add_argument("--method", default="bcos")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.case or CASES:
        print(json.dumps(measure(name, arguments.method, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
