"""Speed of the batched grid pointing game, relative to loops over grids and classes.

    python -m benchmarks.gridpg [--case resnet20-32-2x2 ...] [--threads 2] [--rounds 5]

- `batched`: `grid_pointing_game` on all grids at once;
- `plain`: the loop of the published code, with one forward pass and one `backward()` in explanation mode per
  class and grid;
- `lean`: a loop that calls `attribute` for one map at a time, which computes no gradients of parameters.

All give the same scores. Prints one line of JSON per case: milliseconds per grid (minimum over the rounds),
their ratios, and the largest difference of scores. Runs on a GPU if there is one. The machine should be idle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, in_turns, main
from pipelines.attribution import attribute
from pipelines.bcos import add_inverse, bcosify, explanation_mode
from pipelines.bcos.precision import exact_float32
from pipelines.metrics import grid_pointing_game
from pipelines.models import build
from tests.support.families import pictures, settle

CLASSES = 20
Map = Callable[[Tensor, Tensor], Tensor]  # (1, 6, H, W), (1,) -> (1, H, W)


@dataclass(frozen=True)
class GridCase(Case):
    """Grids of n x n images; `batch` is the number of grids."""

    n: int
    smooth: int  # side of the smoothing kernel, in pixels


CASES = {
    "cpu": {
        "resnet20-32-2x2": GridCase("resnet20", 32, 4, 2, 3),
        "resnet20-32-3x3": GridCase("resnet20", 32, 2, 3, 3),
        "resnet18-224-2x2": GridCase("resnet18", 224, 2, 2, 15),
        "resnet18-224-3x3": GridCase("resnet18", 224, 1, 3, 15),
    },
    "cuda": {
        "resnet20-32-2x2": GridCase("resnet20", 32, 64, 2, 3),
        "resnet50-224-2x2": GridCase("resnet50", 224, 16, 2, 15),
        "resnet50-224-3x3": GridCase("resnet50", 224, 8, 3, 15),
    },
}


def plain_map(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Map (1, H, W) of one class, by one forward and one backward pass as in the published code."""
    image = image.detach().requires_grad_()
    model.zero_grad()
    with explanation_mode(model):
        model(image)[0, target].sum().backward()
    assert image.grad is not None
    return (image.detach() * image.grad).sum(1)


def loop(map_of: Map, case: GridCase, grids: Tensor, classes: Tensor) -> Tensor:
    """Scores (G, n²) of G grids, one class of one grid at a time."""
    scores = torch.zeros(classes.shape, device=grids.device)
    for i, grid in enumerate(grids):
        for j, target in enumerate(classes[i]):
            smoothed = nn.functional.avg_pool2d(
                map_of(grid[None], target[None]), case.smooth, 1, case.smooth // 2
            )
            positive = smoothed[0].clamp_min(0)
            top, left = j // case.n * case.size, j % case.n * case.size
            total = positive.sum()
            own = positive[top : top + case.size, left : left + case.size].sum()
            scores[i, j] = own / total if total > 0 else 0.0
    return scores


@exact_float32()
def measure(case: GridCase, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one case with a B-cos network of random weights; returns one line of figures."""
    torch.manual_seed(0)
    network = bcosify(build(case.network, num_classes=CLASSES)).to(device)
    model = settle(network, add_inverse(pictures(16, case.size)).to(device))
    grids = add_inverse(pictures(case.batch, case.n * case.size)).to(device)
    classes = torch.stack([torch.randperm(CLASSES)[: case.n**2] for _ in range(case.batch)]).to(device)
    attributed = partial(attribute, model, method="bcos")
    batched = partial(grid_pointing_game, attributed, grids, classes, case.smooth)
    loops = {"plain": partial(loop, partial(plain_map, model), case), "lean": partial(loop, attributed, case)}
    scores = batched()
    difference = max(float((scores - each(grids, classes)).abs().max()) for each in loops.values())
    of_one = {name: partial(each, grids[:1], classes[:1]) for name, each in loops.items()}
    turns = in_turns({"batched": batched} | of_one, options.rounds)
    least = {name: 1000 * min(turn[name] for turn in turns) for name in ("batched", *loops)}
    least["batched"] /= case.batch
    line: dict[str, Any] = {f"{name}_ms_per_grid": round(value, 1) for name, value in least.items()}
    line |= {f"{name} / batched": round(least[name] / least["batched"], 2) for name in loops}
    return [line | {"largest_difference": difference}]


if __name__ == "__main__":
    main(__doc__, CASES, measure, rounds=5, training=False)
