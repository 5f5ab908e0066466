"""Deletion and insertion: the probability of a class while pixels are removed in the order of its map.

N images, H x W pixels, K classes.

Source: Samek et al., 2017; Petsiuk et al., RISE, 2018, section 3.3. Least important pixels first: Böhle et
al., CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def deletion(
    model: nn.Module, images: Tensor, attributions: Tensor, targets: Tensor, **options: object
) -> Tensor:
    """Area under the probability while the most important pixels are removed first: (N,) in [0, 1].

    Small for a faithful map. Arguments as in `removal_curve`.
    """
    return _area(removal_curve(model, images, attributions, targets, **options))  # type: ignore[arg-type]


def insertion(
    model: nn.Module, images: Tensor, attributions: Tensor, targets: Tensor, **options: object
) -> Tensor:
    """Area under the probability while the least important pixels are removed first: (N,) in [0, 1].

    Large for a faithful map. Read backwards, the most important pixels are inserted first into the mean
    image. Arguments as in `removal_curve`.
    """
    return _area(removal_curve(model, images, -attributions, targets, **options))  # type: ignore[arg-type]


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


def _area(curve: Tensor) -> Tensor:
    """Area under each row by the trapezoidal rule, with the columns spread over [0, 1]."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)
