"""Localisation of attributions against boxes and masks, one score per (image, class) pair.

N images or (image, class) pairs, H x W pixels, n boxes, T thresholds. Scores map attributions (N, H, W) and
masks (N, H, W) to (N,).

Source: Rao et al., Studying How to Efficiently and Effectively Guide Models with Explanations, ICCV 2023,
section 3.3. Size correction: reproducibility study of Sauter et al., 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pipelines.metrics.means import LocalisationMetric, MeanScore

TINY = 1e-7  # smaller sums and differences count as 0
# Candidate thresholds of IoU; the best one is chosen on validation. Maps of few strong pixels need a low one.
THRESHOLDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.15,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.45,
    0.5,
)


def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    """EPG, the share of a map's positive part that lies inside the mask: (N,) in [0, 1].

    With a segmentation mask it is the on-object EPG. A map whose positive part sums to less than 1e-7 scores
    0; `without_energy` finds these maps.

    Args:
        attributions: (N, H, W), signed.
        masks: (N, H, W) of {0, 1} or bool.
    """
    _same_shape(attributions, masks)
    positive = attributions.clamp_min(0)
    total = positive.sum((1, 2))
    inside = (positive * masks).sum((1, 2))
    return torch.where(total < TINY, torch.zeros_like(total), inside / total.clamp_min(TINY))


def without_energy(attributions: Tensor) -> Tensor:
    """(N,) of bool, True for maps whose EPG is undefined: the positive part sums to less than 1e-7."""
    return attributions.clamp_min(0).sum((1, 2)) < TINY


def area_share(masks: Tensor) -> Tensor:
    """Share of the image that the mask covers, the EPG of a uniform map: (N, H, W) -> (N,) in [0, 1]."""
    return masks.float().mean((1, 2))


def size_corrected(scores: Tensor, shares: Tensor) -> Tensor:
    """Size-corrected EPG, (EPG - share) / (1 - share): (N,), at most 1.

    It is 0 for a uniform map, 1 for a map inside the mask, and negative for a map that avoids the mask.
    `scores` are EPG (N,) and `shares` are from `area_share` (N,). It is undefined if the mask covers the
    whole image (share 1). The result there is 0, and means must leave it out.
    """
    rest = 1 - shares
    return torch.where(rest < TINY, torch.zeros_like(scores), (scores - shares) / rest.clamp_min(TINY))


def attribution_iou(attributions: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """IoU of mask and map at one `threshold`: (N,) in [0, 1]; see `iou_by_threshold`."""
    return iou_by_threshold(attributions, masks, (threshold,))[:, 0]


def iou_by_threshold(attributions: Tensor, masks: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """IoU (intersection over union) of the mask and the map binarised at T thresholds: (N, T) in [0, 1].

    The positive part of the map is scaled to [0, 1] by its minimum and maximum. If these differ by less than
    1e-7, it is divided by the maximum. A map without a positive value stays 0. A pixel counts if it is
    strictly above the threshold. An empty union scores 0; `without_union` finds these pairs. A map with NaN
    scores NaN.

    Args:
        attributions: (N, H, W), signed.
        masks: (N, H, W) of {0, 1} or bool.
        thresholds: T ascending values in [0, 1).
    """
    _same_shape(attributions, masks)
    bounds = torch.tensor(thresholds, dtype=attributions.dtype, device=attributions.device)
    # Number of thresholds that each pixel is strictly above, (N, H·W).
    passed = torch.bucketize(_scaled(attributions), bounds).flatten(1)
    inside = masks.bool().flatten(1)
    counts = torch.zeros(2, len(passed), len(thresholds) + 1, dtype=torch.int32, device=passed.device)
    counts[0].scatter_add_(1, passed, torch.ones_like(passed, dtype=torch.int32))
    counts[1].scatter_add_(1, passed, inside.int())
    above, intersection = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # (N, T), pixels above each threshold
    union = inside.sum(1, keepdim=True) + above - intersection
    broken = attributions.isnan().flatten(1).any(1, keepdim=True)
    return torch.where(broken, torch.nan, intersection / union.clamp_min(1)).to(attributions.dtype)


def without_union(attributions: Tensor, masks: Tensor) -> Tensor:
    """(N,) of bool, True where IoU is undefined: the mask is empty and the map has no positive value."""
    return ~((attributions > 0) | masks.bool()).flatten(1).any(1)


def _scaled(attributions: Tensor) -> Tensor:
    """Positive part of each map scaled to [0, 1], see `iou_by_threshold`."""
    positive = attributions.clamp_min(0)
    least, largest = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    flat = largest - least < TINY
    scale = torch.where(flat, largest, largest - least).clamp_min(torch.finfo(positive.dtype).tiny)
    return torch.where(flat, positive, positive - least) / scale


def box_masks(boxes: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of each image's boxes of one class: (N, H, W) of bool, True for pixel centres in a box.

    Args:
        boxes: (n, 6) [image, class, xmin, ymin, xmax, ymax], images in [0, N), corners in pixels, half-open.
        classes: (N,), the class of each image. The result is on its device, without synchronising with a GPU.
        size: (H, W).
    """
    boxes = boxes.to(classes.device, non_blocking=True)
    image, label = boxes[:, 0].long(), boxes[:, 1].long()
    rows, columns = (torch.arange(side, device=classes.device) + 0.5 for side in size)
    inside_x = (columns >= boxes[:, 2, None]) & (columns < boxes[:, 4, None])
    inside_y = (rows >= boxes[:, 3, None]) & (rows < boxes[:, 5, None])
    # Boxes of other classes are emptied and not removed: the number left would have to come from the GPU.
    inside_y &= (label == classes[image])[:, None]
    covered = torch.zeros(len(classes), *size, dtype=torch.int32, device=classes.device)
    covered.index_add_(0, image, (inside_y[:, :, None] & inside_x[:, None, :]).int())
    return covered > 0


def object_masks(instances: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """Union of each image's instances of one class: (N, H, W) of bool.

    Args:
        instances: (N, H, W) of int64: 0 is background, i >= 1 the i-th box of the image.
        boxes: (n, 6) [image, class, ...], all boxes of the N images, ascending by image.
        classes: (N,), the class of each image.
    """
    boxes, classes = boxes.cpu(), classes.cpu()
    image, label = boxes[:, 0].long(), boxes[:, 1].long()
    # Number of each box in its image, from 1.
    instance = torch.arange(1, len(boxes) + 1) - torch.searchsorted(image, image)
    most = max(len(boxes), int(instances.max()) if instances.numel() else 0)
    table = torch.zeros(len(classes), most + 1, dtype=torch.bool)
    table[image, instance] = label == classes[image]
    return table.to(instances.device).gather(1, instances.flatten(1)).view(instances.shape)


def select_boxes(boxes: Tensor, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Boxes (m, 6) of the images `images`, renumbered by position in `images` to match `batch[images]`.

    Args:
        boxes: (n, 6) [image, class, ...], on the CPU. If other arguments are on a GPU, the call synchronises
            with it.
        images: (P,), indices of images, which may repeat.
        classes: (P,), the class whose boxes are taken from each image; by default boxes of all classes.
    """
    chosen = boxes[:, 0] == images.to(boxes.device)[:, None]
    if classes is not None:
        chosen &= boxes[:, 1] == classes.to(boxes.device)[:, None]
    place, box = chosen.nonzero(as_tuple=True)
    return torch.cat([place[:, None].to(boxes.dtype), boxes[box, 1:]], dim=1)


class PointingGame(MeanScore):
    """Mean EPG, in [0, 1]: `update(attributions (N, H, W), masks (N, H, W))`."""

    higher_is_better = True

    def update(self, attributions: Tensor, masks: Tensor) -> None:  # type: ignore[override]
        super().update(energy_pointing_game(attributions, masks), without_energy(attributions))


class IoU(LocalisationMetric):
    """Mean IoU at the best threshold of `THRESHOLDS` and at 0.5, for the choice of the threshold.

    `update(attributions (N, H, W), masks (N, H, W))` takes validation images. Other images are then scored at
    the chosen threshold.
    """

    higher_is_better = True
    # name -> higher is better
    figures: ClassVar[dict[str, bool | None]] = {
        "iou": True,
        "iou_threshold": None,
        "iou_at_0.5": True,
    }

    def __init__(self) -> None:
        super().__init__(len(THRESHOLDS))

    def update(self, attributions: Tensor, masks: Tensor) -> None:  # type: ignore[override]
        super().update(iou_by_threshold(attributions, masks), without_union(attributions, masks))

    def compute(self) -> dict[str, Tensor]:
        """`iou`, its `iou_threshold` (the lowest of ties), and `iou_at_0.5`; NaN without a defined pair."""
        means = self.mean()
        best = means.argmax()
        threshold = torch.where(means[best].isnan(), torch.nan, means.new_tensor(THRESHOLDS)[best])
        return {"iou": means[best], "iou_threshold": threshold, "iou_at_0.5": means[THRESHOLDS.index(0.5)]}


def _same_shape(attributions: Tensor, masks: Tensor) -> None:
    if attributions.shape != masks.shape:
        raise ValueError(
            f"attributions {tuple(attributions.shape)} and masks {tuple(masks.shape)} differ in shape"
        )
