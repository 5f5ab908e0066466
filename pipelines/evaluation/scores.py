"""Scores of a model's explanations against boxes and masks, its logits, and a teacher's explanations.

N images, K classes, P (image, class) pairs of a batch, T targets per image, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pipelines.attribution import Attribution, Explainer, comparable_explainers, explain, explain_pairs
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights
from pipelines.data.loading.batch import Batch
from pipelines.distributed import Context, gather
from pipelines.evaluation.batches import present
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.evaluation.thresholds import Thresholds
from pipelines.metrics import (
    SIZES,
    THRESHOLDS,
    Agreement,
    LocalisationMetric,
    UnexplainedShare,
    area_share,
    box_masks,
    energy_pointing_game,
    explanation_similarity,
    iou_by_threshold,
    measured,
    object_masks,
    select_boxes,
    size_corrected,
    without_energy,
    without_union,
)
from pipelines.models import ModelError

# Share of the image that the boxes cover: lower bound (exclusive), upper bound (inclusive).
BOX_SIZES = dict(zip(SIZES, ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0)), strict=True))


class Scores:
    """Localisation and completeness of one model's explanations, over all classes in each image."""

    def __init__(self, explained: ExplainedModel, device: torch.device) -> None:
        self.explained = explained
        self.metrics: dict[str, dict[str, Metric]] = {name: {} for name in explained.explanations}
        self.device = device

    def update(self, batch: Batch) -> Tensor:
        """Adds all (image, class) pairs of a batch; returns the model's logits (N, K)."""
        images, in_image = add_inverse(batch["image"]), present(batch, len(self.explained.spec.classes))
        rows, targets = in_image.nonzero(as_tuple=True)
        size = (images.shape[-2], images.shape[-1])
        by_box = by_object = None
        if "boxes" in batch and len(rows):
            boxes = select_boxes(batch["boxes"], rows, targets)
            boxed, by_box = (
                boxes[:, 0].long().bincount(minlength=len(rows)) > 0,
                box_masks(boxes, targets, size),
            )
            if "mask" in batch:
                by_object = object_masks(batch["mask"][rows], select_boxes(batch["boxes"], rows), targets)
        if not self.explained.explanations:
            with torch.no_grad():
                return self.explained.model(images)
        for name, attribution in self.explained.explanations.items():
            logits, maps, *sums = explain_pairs(partial(self._explain, attribution), images, in_image)
            for key, each in zip(self._completeness(attribution), sums, strict=True):
                bias = float(self.explained.model.logit_bias)  # type: ignore[arg-type]
                self._metric(name, key).update(logits[rows, targets], bias, each)
            if by_box is not None:
                self._add_boxes(name, maps, by_box, boxed.to(maps.device))
                self._add_between_classes(name, maps, by_box, rows)
                if by_object is not None:
                    shown, epg = by_object.flatten(1).any(1), energy_pointing_game(maps, by_object)
                    self._add_by_size(
                        name, "on_object_epg", epg, without_energy(maps), area_share(by_box), shown
                    )
        return logits

    def compute(self, context: Context, thresholds: Thresholds | None = None) -> dict[str, dict[str, float]]:
        """Explanation -> means over all workers and numbers of undefined pairs, also by size of the boxes.

        A mean over nothing is absent. `pairs_without_box` counts pairs whose class has no box in the image,
        `pairs_with_empty_boxes` pairs whose boxes cover no pixel's centre.

        Args:
            context: rank and device of this worker.
            thresholds: thresholds of `iou` from `choose_thresholds`. An explanation without a threshold gets
                no `iou`. `None` for validation images, on which the thresholds are chosen here. `iou_at_0.5`
                is independent of them.
        """
        found: dict[str, dict[str, float]] = {}
        for name, metrics in self.metrics.items():
            keys = sorted(set().union(*gather(list(metrics), context)))  # a worker may have had no images
            values = {key: self._metric(name, key).compute() for key in keys}
            place = self._threshold(name, values, thresholds)
            found[name] = {} if place is None else {"iou_threshold": THRESHOLDS[place]}
            for key, value in values.items():
                found[name] |= self._figures(key, value, place)
        return found

    def _threshold(self, name: str, values: Mapping[str, Any], thresholds: Thresholds | None) -> int | None:
        """Index in `THRESHOLDS` of the explanation's threshold; `None` without a threshold or without IoU."""
        if "iou" not in values or values["iou"]["mean"].isnan().any():
            return None
        if thresholds is None:
            return int(values["iou"]["mean"].argmax())
        return THRESHOLDS.index(thresholds[name]) if name in thresholds else None

    @staticmethod
    def _figures(key: str, value: Any, threshold: int | None) -> dict[str, float]:
        """Entries of the metric `key` in `compute`'s result; `threshold` is an index into `THRESHOLDS`."""
        if not isinstance(value, dict):
            return measured({key: value})
        count, undefined, mean = int(value["count"]), int(value["undefined"]), value["mean"]
        if key in ("pairs_without_box", "pairs_with_empty_boxes"):
            return {key: undefined}
        found: dict[str, float] = {f"{key}_undefined": undefined}
        if key.startswith("epg"):
            found[key.replace("epg", "pairs")] = count
        if not key.startswith("iou"):
            return found | measured({key: mean})
        at_half = measured({"iou_at_0.5": mean[THRESHOLDS.index(0.5)]}) if key == "iou" else {}
        return found | at_half | ({} if threshold is None else measured({key: mean[threshold]}))

    def _explain(self, attribution: Attribution, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, K), maps (N, T, H, W), and total contributions (N, T) per score of `_completeness`."""
        model = self.explained.model
        if attribution.of_dynamic_weights:
            logits, weights_NTCHW = dynamic_weights(model, images, targets)
            maps = contribution_map(images, weights_NTCHW)
            baseline = (model.mean[:, None, None] * weights_NTCHW).double().sum((2, 3, 4))  # type: ignore[index]
            whole = maps.double().sum((2, 3))
            return logits, maps, whole, whole - baseline
        logits, maps = explain(model, images, targets, attribution)
        return logits, maps, *(maps.double().sum((2, 3)) for _ in self._completeness(attribution))

    def _completeness(self, attribution: Attribution) -> tuple[str, ...]:
        """Names of the scores for how well the map sums to the logit.

        There are none for GradCAM, whose maps are not in the unit of a logit, and for maps of inner layers.
        """
        if attribution.of_dynamic_weights:
            return ("unexplained_share_as_published", "unexplained_share")
        return (
            () if attribution.method == "gradcam" or attribution.layer is not None else ("unexplained_share",)
        )

    def _add_boxes(self, name: str, maps: Tensor, masks: Tensor, boxed: Tensor) -> None:
        """Adds the scores of maps (P, H, W) against the boxes of their pairs, as masks (P, H, W).

        `boxed` (P,) marks pairs with a box. Only pairs whose boxes cover a pixel are scored.
        """
        shares = area_share(masks)
        located = shares > 0
        self._add(name, "pairs_without_box", boxed.float(), ~boxed)
        self._add(name, "pairs_with_empty_boxes", located.float(), boxed & ~located)
        epg, without = energy_pointing_game(maps, masks), without_energy(maps)
        self._add_by_size(name, "epg", epg, without, shares, located)
        self._add_by_size(
            name,
            "size_corrected_epg",
            size_corrected(epg, shares),
            without,
            shares,
            located,
            missing=shares == 1,
        )
        self._add_by_size(
            name, "iou", iou_by_threshold(maps, masks), without_union(maps, masks), shares, located
        )

    def _add_between_classes(self, name: str, maps: Tensor, masks: Tensor, rows: Tensor) -> None:
        """Hook for scores between classes of an image: maps, masks (P, H, W), image indices `rows` (P,)."""

    def _add_by_size(
        self,
        name: str,
        key: str,
        values: Tensor,
        undefined: Tensor,
        shares: Tensor,
        chosen: Tensor,
        missing: Tensor | None = None,
    ) -> None:
        """Adds a score, (P,) or for IoU (P, thresholds), of the `chosen` pairs, in all and per box size."""
        some = {key: chosen}
        some |= {
            f"{key}_{size}": chosen & (shares > least) & (shares <= most)
            for size, (least, most) in BOX_SIZES.items()
        }
        for each, pairs in some.items():
            if each == key or pairs.any():
                self._add(
                    name, each, values[pairs], undefined[pairs], None if missing is None else missing[pairs]
                )

    def _add(
        self, name: str, key: str, values: Tensor, undefined: Tensor, missing: Tensor | None = None
    ) -> None:
        self._metric(name, key).update(values, undefined, missing)

    def _metric(self, name: str, key: str) -> Any:
        if key not in self.metrics[name]:
            if key.startswith("unexplained_share"):
                metric: Metric = UnexplainedShare()
            else:
                metric = LocalisationMetric(len(THRESHOLDS) if key.startswith("iou") else None)
            self.metrics[name][key] = metric.to(self.device)
        return self.metrics[name][key]


class StudentScores:
    """Agreement of a student with its teacher, and similarity of their explanations if comparable."""

    def __init__(self, student: ExplainedModel, teacher: ExplainedModel, device: torch.device) -> None:
        size, held = student.spec.image_size, student.spec.kind == teacher.spec.kind == "bcos"
        probe = torch.full((1, 6, size, size), 0.5, device=device)
        self.models = (student.model, teacher.model)
        self.explain: tuple[Explainer, Explainer] | None = None
        with suppress(ModelError):  # one of the two has no GradCAM
            self.explain = comparable_explainers(*self.models, probe, held=held)
        self.agreement, self.similarity = Agreement().to(device), LocalisationMetric().to(device)

    def update(self, images: Tensor, logits: Tensor, teacher_logits: Tensor) -> None:
        """Adds a batch of images (N, 3, H, W) with both models' logits (N, K)."""
        self.agreement.update(logits, teacher_logits)
        if self.explain is None:
            return
        images, targets = add_inverse(images), teacher_logits.argmax(1)
        one, other = (
            explain(model, images, targets)[1]
            for explain, model in zip(self.explain, self.models, strict=True)
        )
        empty = (one.flatten(1) == 0).all(1) | (other.flatten(1) == 0).all(1)
        self.similarity.update(explanation_similarity(one, other), empty)

    def compute(self) -> dict[str, float]:
        """Means over all workers, and the number of pairs of maps of which one is zero."""
        found = measured({"agreement": self.agreement.compute()})
        if self.explain is None:
            return found
        similarity = self.similarity.compute()
        found |= measured({"explanation_similarity": similarity["mean"]})
        return found | {"explanation_similarity_undefined": int(similarity["undefined"])}
