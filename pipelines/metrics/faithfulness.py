"""Deletion, insertion and single deletion: a class's output while pixels or patches are removed.

N images, H x W pixels, K classes.

Source: Samek et al., 2017; Petsiuk et al., RISE, 2018, section 3.3. Least important pixels first: Böhle et
al., CVPR 2021. Single deletion: Hesse, Schaub-Meyer, Roth, Benchmarking the Attribution Quality of Vision
Models, NeurIPS 2024 datasets and benchmarks, and its code, visinf/idsds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipelines.metrics.rank_correlation import rank_correlation


def deletion(
    model: nn.Module, images: Tensor, attributions: Tensor, targets: Tensor, **options: object
) -> Tensor:
    """Area under the probability while the most important pixels are removed first: (N,) in [0, 1].

    Small for a faithful map. Arguments as in `removal_curve`.
    """
    curve = removal_curve(model, images, attributions, targets, **options)  # type: ignore[arg-type]
    return area_under(curve)


def insertion(
    model: nn.Module, images: Tensor, attributions: Tensor, targets: Tensor, **options: object
) -> Tensor:
    """Area under the probability while the least important pixels are removed first: (N,) in [0, 1].

    Large for a faithful map. Read backwards, the most important pixels are inserted first into the mean
    image. Arguments as in `removal_curve`.
    """
    curve = removal_curve(model, images, -attributions, targets, **options)  # type: ignore[arg-type]
    return area_under(curve)


@torch.no_grad()
def removal_curve(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    targets: Tensor,
    *,
    steps: int = 32,
    batch_size: int = 256,
    probability: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """Probability of the target class while the mean image replaces pixels, by falling attribution.

    Args:
        model: a model of this project, with the buffer `mean` (6,).
        images: (N, 6, H, W).
        attributions: (N, H, W).
        targets: (N,).
        steps: number of equal shares of the pixels that are removed one after the other.
        batch_size: images per forward pass; pairs of an image and a step are batched together.
        probability: maps logits (M, K) to probabilities, `torch.sigmoid` or a softmax over classes.

    Returns:
        (N, steps + 1), from no pixel removed to all pixels removed.
    """
    pixels = attributions[0].numel()
    ranks = (
        attributions.flatten(1)
        .argsort(dim=1, descending=True, stable=True)
        .argsort(dim=1)
        .view(attributions.shape)
    )
    removed = torch.linspace(0, pixels, steps + 1, device=images.device).round()
    pairs = torch.cartesian_prod(
        torch.arange(len(images), device=images.device), torch.arange(steps + 1, device=images.device)
    )
    mean = model.mean[:, None, None]  # type: ignore[index]
    curve = []
    for index, step in (batch.unbind(1) for batch in pairs.split(batch_size)):
        gone = (ranks[index] < removed[step, None, None])[:, None]
        logits = model(torch.where(gone, mean, images[index]))
        curve.append(probability(logits).gather(1, targets[index, None])[:, 0])
    return torch.cat(curve).view(len(images), steps + 1)


def area_under(curve: Tensor) -> Tensor:
    """Area under each row by the trapezoidal rule, with the columns spread over [0, 1]: (N, S) -> (N,)."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


@torch.no_grad()
def single_deletion(
    model: nn.Module,
    images: Tensor,
    attributions: Tensor,
    targets: Tensor,
    *,
    grid: int = 4,
    batch_size: int = 256,
) -> Tensor:
    """Rank correlation of patches' attributions and drops of the logit: (N,) in [-1, 1], float64.

    The image is cut into `grid` x `grid` patches. The mean image replaces one patch at a time. NaN where all
    attributions or all drops are equal, and with NaN. A rank correlation has no unit and no baseline, so the
    score compares explanations of different models.

    Published figures are of models that were fine-tuned with the mean image in one random patch of every
    second image, so that such images are in the domain. The models of this project are not: for them the
    domain is kept only approximately, and a drop may come from the patch's edges. The authors call this the
    single deletion score, without "in-domain".

    Args:
        model, images, attributions, targets: as in `removal_curve`.
        grid: patches per side, which must divide H and W.
        batch_size: images per forward pass.

    Raises:
        ValueError: `grid` does not divide H and W.
    """
    count, height, width = attributions.shape
    if height % grid or width % grid:
        raise ValueError(
            f"grid {grid} does not divide images of {height} x {width} pixels into equal patches"
        )
    cells = (count, grid, height // grid, grid, width // grid)
    of_patch = attributions.double().view(cells).sum((2, 4)).flatten(1)
    mean = model.mean[:, None, None]  # type: ignore[index]

    def target_logits(without: Callable[[Tensor], Tensor]) -> Tensor:
        parts = zip(images.split(batch_size), targets.split(batch_size), strict=True)
        return torch.cat([model(without(some)).gather(1, wanted[:, None])[:, 0] for some, wanted in parts])

    def without_patch(row: int, column: int) -> Callable[[Tensor], Tensor]:
        gone = torch.zeros(grid, 1, grid, 1, dtype=torch.bool, device=images.device)
        gone[row, 0, column] = True
        gone = gone.expand(cells[1:]).reshape(height, width)
        return lambda some: torch.where(gone, mean, some)

    logits = target_logits(lambda some: some)
    left = [target_logits(without_patch(row, column)) for row in range(grid) for column in range(grid)]
    return rank_correlation(of_patch, logits[:, None] - torch.stack(left, dim=1))
