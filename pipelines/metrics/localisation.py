"""Localisation of maps by boxes and masks. All per image and class: attributions (N, H, W) and masks (N, H, W) -> (N,).

Source: Rao et al., Studying How to Efficiently and Effectively Guide Models with Explanations, ICCV 2023, section 4; the size
correction follows the reproducibility study of Sauter et al., 2024. methods.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

TINY = 1e-7


def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive part of a map inside the mask (EPG; with a segmentation mask, on-object EPG): (N,) in [0, 1].

    Args:
        attributions: (N, H, W), signed.
        masks: (N, H, W) of {0, 1} or bool.

    A map whose positive part sums to less than 1e-7 scores 0; `without_energy` says which ones.
    """
    _same_shape(attributions, masks)
    positive = attributions.clamp_min(0)
    total = positive.sum((1, 2))
    inside = (positive * masks).sum((1, 2))
    return torch.where(total < TINY, torch.zeros_like(total), inside / total.clamp_min(TINY))


def without_energy(attributions: Tensor) -> Tensor:
    """(N,) of bool: the maps that the energy pointing game is undefined for."""
    return attributions.clamp_min(0).sum((1, 2)) < TINY


def area_share(masks: Tensor) -> Tensor:
    """Share of the image that the mask covers: (N, H, W) -> (N,) in [0, 1], what a uniform map scores."""
    return masks.float().mean((1, 2))


def size_corrected(scores: Tensor, shares: Tensor) -> Tensor:
    """(EPG - share) / (1 - share): 0 for a uniform map, 1 for one inside the mask, below 0 for one that avoids it.

    `scores` and `shares` are (N,). Where the mask covers the whole image (share 1) there is nothing to score: 0.
    """
    rest = 1 - shares
    return torch.where(rest < TINY, torch.zeros_like(scores), (scores - shares) / rest.clamp_min(TINY))


def attribution_iou(attributions: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask and the binarised map: (N,) in [0, 1].

    The positive part is scaled to [0, 1] by its least and largest value (by its largest alone, where they differ by less than
    1e-7; not at all, where it is 0) and counts where it is strictly above 0.5. An empty union scores 0; `without_union` says
    which ones.

    Args:
        attributions: (N, H, W), signed.
        masks: (N, H, W) of {0, 1} or bool.
    """
    _same_shape(attributions, masks)
    intersection, union = _overlap(attributions, masks)
    return (intersection / union.clamp_min(1)).to(attributions.dtype)


def without_union(attributions: Tensor, masks: Tensor) -> Tensor:
    """(N,) of bool: the pairs that IoU is undefined for, both map and mask empty."""
    return _overlap(attributions, masks)[1] == 0


def _overlap(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of intersection and of union, (N,) each."""
    positive = attributions.clamp_min(0)
    least, largest = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    flat = largest - least < TINY
    scale = torch.where(flat, largest, largest - least).clamp_min(torch.finfo(positive.dtype).tiny)
    binary, masks = torch.where(flat, positive, positive - least) / scale > 0.5, masks.bool()
    return (binary & masks).sum((1, 2)), (binary | masks).sum((1, 2))


def box_masks(boxes: Sequence[Tensor], classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of an image's boxes of one class, as a mask.

    Args:
        boxes: for each of N images (n_i, 5): class, xmin, ymin, xmax, ymax in pixels, half-open.
        classes: (N,), the class of each image.
        size: (H, W).

    Returns:
        (N, H, W) of bool, on the device of the classes: the pixels whose centre lies in such a box.
    """
    counts = torch.tensor([len(each) for each in boxes], dtype=torch.long)
    image_of_box = torch.arange(len(boxes)).repeat_interleave(counts).to(classes.device, non_blocking=True)
    flat = torch.cat(list(boxes)) if len(boxes) else torch.zeros(0, 5)
    flat = flat.to(classes.device, non_blocking=True)
    rows, columns = (torch.arange(side, device=classes.device) + 0.5 for side in size)
    inside_x = (columns >= flat[:, 1, None]) & (columns < flat[:, 3, None])
    inside_y = (rows >= flat[:, 2, None]) & (rows < flat[:, 4, None])
    inside_y &= (flat[:, 0].long() == classes[image_of_box])[:, None]  # not left out: a GPU would have to say how many there are
    covered = torch.zeros(len(boxes), *size, dtype=torch.int32, device=classes.device)
    covered.index_add_(0, image_of_box, (inside_y[:, :, None] & inside_x[:, None, :]).int())
    return covered > 0


def object_masks(instances: Tensor, boxes: Sequence[Tensor], classes: Tensor) -> Tensor:
    """Union of an image's instances of one class, as a mask.

    Args:
        instances: (N, H, W) of int64: 0 is background, i belongs to the box boxes[i - 1] of the image.
        boxes: for each of N images (n_i, 5), of which the class is read.
        classes: (N,), the class of each image.

    Returns:
        (N, H, W) of bool.
    """
    most = max([int(instances.max()) if instances.numel() else 0, *(len(each) for each in boxes)])
    table = torch.zeros(len(boxes), most + 1, dtype=torch.bool)
    for row, each, wanted in zip(table, boxes, classes.tolist(), strict=True):
        row[1 : len(each) + 1] = each[:, 0].long() == wanted
    return table.to(instances.device).gather(1, instances.flatten(1)).view(instances.shape)


class LocalisationMetric(Metric):
    """Mean of a score over all (image, class) pairs; how many there were, and how many of them are undefined.

    `update(scores (N,), undefined (N,) of bool)`; `compute()` gives `{"mean", "count", "undefined"}`. Undefined cases count with
    the score that they have (0). Sums are float64, so that the order and the number of workers do not matter.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    undefined: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, undefined: Tensor | None = None) -> None:
        """Adds scores (N,), of which those with `undefined` (N,) are counted as such."""
        self.total += scores.detach().double().sum()
        self.count += len(scores)
        if undefined is not None:
            self.undefined += undefined.sum()

    def compute(self) -> dict[str, Tensor]:
        """The mean (NaN without any case), the number of cases, the number of undefined ones."""
        return {"mean": self.total / self.count, "count": self.count, "undefined": self.undefined}


class PointingGame(LocalisationMetric):
    """Mean EPG: `update(attributions (N, H, W), masks (N, H, W))`; `compute()` gives a scalar, NaN without any map."""

    def update(self, attributions: Tensor, masks: Tensor) -> None:  # type: ignore[override]
        """Adds the scores of N maps."""
        super().update(energy_pointing_game(attributions, masks), without_energy(attributions))

    def compute(self) -> Tensor:  # type: ignore[override]
        """In [0, 1]."""
        return super().compute()["mean"]


class IoU(LocalisationMetric):
    """Mean IoU of binarised maps: as `PointingGame`."""

    def update(self, attributions: Tensor, masks: Tensor) -> None:  # type: ignore[override]
        """Adds the scores of N maps."""
        super().update(attribution_iou(attributions, masks), without_union(attributions, masks))

    def compute(self) -> Tensor:  # type: ignore[override]
        """In [0, 1]."""
        return super().compute()["mean"]


def _same_shape(attributions: Tensor, masks: Tensor) -> None:
    if attributions.shape != masks.shape:
        raise ValueError(f"attributions {tuple(attributions.shape)} and masks {tuple(masks.shape)} differ in shape")
