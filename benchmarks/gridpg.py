"""Speed of the batched grid pointing game against loops over grids and classes that give the same scores.

    python -m benchmarks.gridpg [--case resnet20-32-2x2] [--method bcos] [--threads 1] [--rounds 5]

The `plain` loop is the one of the published code: for each class of each grid one forward pass, and `backward()` from the logit
in explanation mode. The `lean` loop asks `attribute` for one map at a time, which computes no gradients of weights. Prints one
line of JSON a case: milliseconds a grid of each (the least of the rounds), their ratios, and the largest difference of scores.

With one thread CPU time is measured, to which what else runs on the machine adds little; with more, and on a GPU, where there is
one, the time that passes, for which the machine should be quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import clock
from pipelines.attribution import attribute
from pipelines.bcos import add_inverse, bcosify, explanation_mode
from pipelines.bcos.precision import exact_float32
from pipelines.metrics import grid_pointing_game
from pipelines.models import ConventionalNetwork, build

CLASSES = 20
Map = Callable[[Tensor, Tensor], Tensor]  # (1, 6, H, W), (1,) -> (1, H, W)


@dataclass(frozen=True)
class Case:
    """A network, the size of its images, the side of a grid, grids at once, the smoothing kernel."""

    network: str
    size: int
    n: int
    batch: int
    smooth: int


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "cpu": {
        "resnet20-32-2x2": Case("resnet20", 32, 2, 4, 3),
        "resnet20-32-3x3": Case("resnet20", 32, 3, 2, 3),
        "resnet18-224-2x2": Case("resnet18", 224, 2, 2, 15),
        "resnet18-224-3x3": Case("resnet18", 224, 3, 1, 15),
    },
    "cuda": {
        "resnet20-32-2x2": Case("resnet20", 32, 2, 64, 3),
        "resnet50-224-2x2": Case("resnet50", 224, 2, 16, 15),
        "resnet50-224-3x3": Case("resnet50", 224, 3, 8, 15),
    },
}[DEVICE]


def pictures(count: int, side: int) -> Tensor:
    """Random pictures as smooth as photographs are: (count, 6, side, side). On noise, rounding alone moves scores by 1e-4."""
    coarse = torch.rand(count, 3, side // 8, side // 8, device=DEVICE)
    return add_inverse(nn.functional.interpolate(coarse, (side, side), mode="bilinear"))


def model_of(case: Case, method: str) -> nn.Module:
    """The network at random weights, B-cosified for `bcos`; the statistics of its norms are those of a batch.

    At B = 2 the features of random layers are tiny, and only norms with a tiny epsilon bring them up again.
    """
    network = build(case.network, num_classes=CLASSES)
    model = (bcosify(network) if method == "bcos" else ConventionalNetwork(network)).to(DEVICE)
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum, module.eps = 1.0, 1e-20  # type: ignore[assignment]
    with torch.no_grad():
        model.train()(pictures(16, case.size))
    return model.eval()


def plain_map(model: nn.Module, method: str, image: Tensor, target: Tensor) -> Tensor:
    """One map by one forward and one backward pass: (1, H, W)."""
    image = image.detach().requires_grad_()
    model.zero_grad()
    with explanation_mode(model) if method == "bcos" else contextlib.nullcontext():
        model(image)[0, target].sum().backward()
    assert image.grad is not None
    values = image.detach() if method == "bcos" else image.detach() - model.mean[:, None, None]  # type: ignore[index]
    return (values * image.grad).sum(1)


def loop(map_of: Map, case: Case, grids: Tensor, classes: Tensor) -> Tensor:
    """The game, one class of one grid at a time: (G, n²)."""
    scores = torch.zeros(classes.shape, device=DEVICE)
    for i, grid in enumerate(grids):
        for j, target in enumerate(classes[i]):
            smoothed = nn.functional.avg_pool2d(map_of(grid[None], target[None]), case.smooth, 1, case.smooth // 2)
            positive = smoothed[0].clamp_min(0)
            top, left = j // case.n * case.size, j % case.n * case.size
            total = positive.sum()
            own = positive[top : top + case.size, left : left + case.size].sum()
            scores[i, j] = own / total if total > 0 else 0.0
    return scores


def milliseconds(run: Callable[[], object], grids: int) -> float:
    """Of one grid."""
    now = time.process_time if DEVICE == "cpu" and torch.get_num_threads() == 1 else clock
    start = now()
    run()
    return (now() - start) / grids * 1e3


@exact_float32()
def measure(name: str, method: str, rounds: int) -> dict[str, object]:
    """One line of the report."""
    case = CASES[name]
    torch.manual_seed(0)
    model = model_of(case, method)
    side = case.n * case.size
    grids = pictures(case.batch, side)
    classes = torch.stack([torch.randperm(CLASSES)[: case.n**2] for _ in range(case.batch)]).to(DEVICE)
    batched = partial(grid_pointing_game, partial(attribute, model, method=method), grids, classes, case.smooth)
    plain = partial(loop, partial(plain_map, model, method), case)
    lean = partial(loop, partial(attribute, model, method=method), case)
    scores = batched()
    difference = max(float((scores - each(grids, classes)).abs().max()) for each in (plain, lean))
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "batched": (batched, case.batch),
        "plain": (lambda: plain(grids[:1], classes[:1]), 1),
        "lean": (lambda: lean(grids[:1], classes[:1]), 1),
    }
    least = {kind: min(milliseconds(*run) for _ in range(rounds)) for kind, run in runs.items()}
    report: dict[str, object] = {"case": name, "method": method, "device": DEVICE, "threads": torch.get_num_threads()}
    report |= {f"{kind}_ms_per_grid": round(value, 1) for kind, value in least.items()}
    report |= {f"ratio_to_{kind}": round(least[kind] / least["batched"], 2) for kind in ("plain", "lean")}
    report["largest_difference"] = difference
    return report


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), action="append")
    parser.add_argument("--method", choices=["bcos", "input_x_gradient"], default="bcos")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.case or CASES:
        print(json.dumps(measure(name, arguments.method, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
