"""Scores of a model's explanations on a batch, and of a student's explanations beside its teacher's.

N images, K classes, P (image, class) pairs of a batch, T targets per image, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pandas
import torch
from torch import Tensor, nn

from pipelines.attribution import Attribution, Explainer, comparable_explainers, explain, explain_pairs
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights
from pipelines.data.loading.batch import Batch
from pipelines.evaluation.batches import present
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.metrics import (
    THRESHOLDS,
    area_share,
    box_masks,
    energy_pointing_game,
    explanation_similarity,
    iou_by_threshold,
    object_masks,
    select_boxes,
    size_corrected,
    without_energy,
    without_union,
)
from pipelines.models import ModelError

IOU = [f"iou_at_{threshold}" for threshold in THRESHOLDS]  # columns with the IoU at each threshold


@dataclass(frozen=True)
class Regions:
    """Where the class of each (image, class) pair is in its image."""

    boxed: Tensor  # (P,) of bool: the class has a box
    boxes: Tensor  # (P, H, W) of bool: union of the boxes of the class
    objects: Tensor | None  # (P, H, W) of bool: union of its instances, if the data has masks

    @classmethod
    def of(cls, batch: Batch, rows: Tensor, targets: Tensor) -> Regions | None:
        """Regions of the classes `targets` (P,) in the images `rows` (P,); `None` without boxes."""
        if "boxes" not in batch or not len(rows):
            return None
        boxes, size = select_boxes(batch["boxes"], rows, targets), batch["image"].shape[-2:]
        boxed = boxes[:, 0].long().bincount(minlength=len(rows)) > 0
        objects = None
        if "mask" in batch:
            objects = object_masks(batch["mask"][rows], select_boxes(batch["boxes"], rows), targets)
        return cls(boxed.to(rows.device), box_masks(boxes, targets, (size[0], size[1])), objects)


def score_explanations(
    explained: ExplainedModel, batch: Batch, between_classes: bool = False
) -> tuple[Tensor, pandas.DataFrame]:
    """Logits (N, K) of a batch, and the scores of each explanation for each class in an image.

    Args:
        explained: the model and its explanations.
        batch: images with labels, and boxes and masks if the data has them.
        between_classes: also counts how often the map of a class points to its own object, see
            `pointing_to_own`.

    Returns:
        The logits, and a table with a row per explanation, image and class in the image, whose columns are
        described in `records.Records`. Scores that do not exist for a row are missing (NaN).
    """
    images, in_image = add_inverse(batch["image"]), present(batch, len(explained.spec.classes))
    rows, targets = in_image.nonzero(as_tuple=True)
    if not explained.explanations:
        with torch.no_grad():
            return explained.model(images), pandas.DataFrame()
    regions, tables = Regions.of(batch, rows, targets), []
    keys = [batch["key"][row] for row in rows.tolist()]
    for name, attribution in explained.explanations.items():
        by = partial(_explain, explained.model, attribution)
        logits, maps, *sums = explain_pairs(by, images, in_image)
        logit = logits[rows, targets]
        columns = {"class": targets, "logit": logit}
        if sums:
            bias = torch.as_tensor(explained.model.logit_bias).double()
            columns |= {"logit_bias": bias.expand(len(rows)), "contributions": sums[-1]}
        if len(sums) > 1:
            columns["contributions_as_published"] = sums[0]
        if regions is not None:
            columns |= localisation_columns(maps, regions)
            if between_classes:
                columns |= pointing_to_own(maps, regions.boxes, rows)
        arrays = {column: values.detach().cpu().numpy() for column, values in columns.items()}
        tables.append(pandas.DataFrame({"key": keys, "explanation": name, **arrays}))
    return logits, pandas.concat(tables, ignore_index=True)


def _explain(
    model: nn.Module, attribution: Attribution, images: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Logits (N, K), maps (N, T, H, W), and sums of contributions (N, T), the mean-referenced ones last.

    GradCAM, whose maps are not in the unit of a logit, and maps of inner layers have no sums.
    """
    if attribution.of_dynamic_weights:
        logits, weights_NTCHW = dynamic_weights(model, images, targets)
        maps = contribution_map(images, weights_NTCHW)
        baseline = (model.mean[:, None, None] * weights_NTCHW).double().sum((2, 3, 4))  # type: ignore[index]
        whole = maps.double().sum((2, 3))
        return logits, maps, whole, whole - baseline
    logits, maps = explain(model, images, targets, attribution)
    if attribution.method == "gradcam" or attribution.layer is not None:
        return logits, maps
    return logits, maps, maps.double().sum((2, 3))


def localisation_columns(maps: Tensor, regions: Regions) -> dict[str, Tensor]:
    """Columns with the scores of maps (P, H, W), NaN for pairs whose boxes cover no pixel's centre."""
    shares = area_share(regions.boxes)
    located, epg = shares > 0, energy_pointing_game(maps, regions.boxes)
    columns = {
        "boxed": regions.boxed,
        "box_share": shares,
        "has_energy": ~without_energy(maps),
        "has_union": ~without_union(maps, regions.boxes),
        "epg": epg.where(located, torch.nan),
        "size_corrected_epg": size_corrected(epg, shares).where(located & (shares < 1), torch.nan),
    }
    if regions.objects is not None:
        shown = area_share(regions.objects)
        on_object = energy_pointing_game(maps, regions.objects)
        columns |= {"object_share": shown, "on_object_epg": on_object.where(shown > 0, torch.nan)}
    iou = iou_by_threshold(maps, regions.boxes).where(located[:, None], torch.nan)
    return columns | dict(zip(IOU, iou.unbind(1), strict=True))


def pointing_to_own(maps: Tensor, masks: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Counts, for each class A of an image, the other classes B beside which A's map points to A.

    A's map points to A if it has a larger part of its energy on A than B's map has. "On A" means inside the
    boxes of A and outside the boxes of B; classes B that leave no such pixels are left out.

    Args:
        maps: (P, H, W).
        masks: (P, H, W) of bool, the boxes.
        rows: (P,), index of the image.

    Returns:
        Columns `other_classes` (P,), the number of classes B, and `pointed_to_own` (P,), how many of these
        the map of A passes. Maps that do not depend on the class pass none, random maps half of them.
    """
    located, count = masks.flatten(1).any(1), len(rows)
    apart = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    one, other = ((rows[:, None] == rows) & located[:, None] & located & apart).nonzero(as_tuple=True)
    own = masks[one] & ~masks[other]
    some = own.flatten(1).any(1)
    one, other, own = one[some], other[some], own[some]
    more = energy_pointing_game(maps[one], own) > energy_pointing_game(maps[other], own)
    return {
        "other_classes": one.bincount(minlength=count),
        "pointed_to_own": one[more].bincount(minlength=count),
    }


class Similarity:
    """Similarity of a student's explanations to its teacher's, for the class that the teacher predicts."""

    def __init__(self, student: ExplainedModel, teacher: ExplainedModel, device: torch.device) -> None:
        size, held = student.spec.image_size, student.spec.kind == teacher.spec.kind == "bcos"
        probe = torch.full((1, 6, size, size), 0.5, device=device)
        self.models = (student.model, teacher.model)
        self.explain: tuple[Explainer, Explainer] | None = None
        with suppress(ModelError):  # one of the two has no GradCAM
            self.explain = comparable_explainers(*self.models, probe, held=held)

    def __call__(self, images: Tensor, teacher_logits: Tensor) -> Mapping[str, Tensor]:
        """Columns for a batch of images (N, 3, H, W), given the teacher's logits (N, K).

        `explanation_similarity` (N,) in [-1, 1], and `empty_map` (N,) of bool, True if one of the two maps is
        zero; the similarity is then 0. There are no columns if the two explanations cannot be compared.
        """
        if self.explain is None:
            return {}
        images, targets = add_inverse(images), teacher_logits.argmax(1)
        one, other = (
            by(model, images, targets)[1] for by, model in zip(self.explain, self.models, strict=True)
        )
        empty = (one.flatten(1) == 0).all(1) | (other.flatten(1) == 0).all(1)
        return {"explanation_similarity": explanation_similarity(one, other), "empty_map": empty}
