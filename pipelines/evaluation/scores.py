"""Scores of a model's explanations, image by image: by boxes and masks, by its logits, by a teacher's explanations."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from pipelines.attribution import Attribution, Explainer, comparable_explainers, explain, explain_pairs
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights
from pipelines.data.loading.batch import Batch
from pipelines.distributed import Context, gather
from pipelines.evaluation.batches import present
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.metrics import (
    Agreement,
    LocalisationMetric,
    UnexplainedShare,
    area_share,
    attribution_iou,
    box_masks,
    energy_pointing_game,
    explanation_similarity,
    object_masks,
    select_boxes,
    size_corrected,
    without_energy,
    without_union,
)
from pipelines.models import ModelError

BOX_SIZES = {"small": (0.0, 0.1), "medium": (0.1, 0.3), "large": (0.3, 1.0)}  # share of the image: above, up to


class Scores:
    """Localisation and completeness of one model's explanations, for the classes that are in each image."""

    def __init__(self, explained: ExplainedModel, device: torch.device) -> None:
        self.explained = explained
        self.metrics: dict[str, dict[str, Metric]] = {name: {} for name in explained.explanations}
        self.device = device

    def update(self, batch: Batch) -> Tensor:
        """Adds every (image, class) pair of a batch; returns the model's logits (N, K)."""
        images, in_image = add_inverse(batch["image"]), present(batch, len(self.explained.spec.classes))
        rows, targets = in_image.nonzero(as_tuple=True)
        size = (images.shape[-2], images.shape[-1])
        by_box = by_object = None
        if "boxes" in batch and len(rows):
            boxes = select_boxes(batch["boxes"], rows, targets)
            boxed, by_box = boxes[:, 0].long().bincount(minlength=len(rows)) > 0, box_masks(boxes, targets, size)
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
                if by_object is not None:
                    shown, epg = by_object.flatten(1).any(1), energy_pointing_game(maps, by_object)
                    self._add_by_size(name, "on_object_epg", epg, without_energy(maps), area_share(by_box), shown)
        return logits

    def compute(self, context: Context) -> dict[str, dict[str, float]]:
        """For each explanation the means over all workers, and how many pairs were undefined; by size of the boxes too.

        `pairs_without_box` counts pairs of an image and a class that has no box there, `pairs_with_empty_boxes` those of which no
        box covers a pixel.
        """
        found: dict[str, dict[str, float]] = {}
        for name, metrics in self.metrics.items():
            found[name] = {}
            for key in sorted(set().union(*gather(list(metrics), context))):  # a worker may have had no image
                value = self._metric(name, key).compute()
                if key in ("pairs_without_box", "pairs_with_empty_boxes"):
                    found[name][key] = int(value["undefined"])
                elif isinstance(value, dict):
                    found[name] |= {key: float(value["mean"]), f"{key}_undefined": int(value["undefined"])}
                    if key.startswith("epg"):
                        found[name][f"{key.replace('epg', 'pairs')}"] = int(value["count"])
                else:
                    found[name][key] = float(value)
        return found

    def _explain(self, attribution: Attribution, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Logits (n, K), maps (n, T, H, W), and for each of `_completeness` the sum over its map's pixels (n, T)."""
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
        """Scores of how the map sums to the logit; none for GradCAM, which has another unit, and for layers."""
        if attribution.of_dynamic_weights:
            return ("unexplained_share_as_published", "unexplained_share")
        return () if attribution.method == "gradcam" or attribution.layer is not None else ("unexplained_share",)

    def _add_boxes(self, name: str, maps: Tensor, masks: Tensor, boxed: Tensor) -> None:
        """Scores of maps (P, H, W) against the boxes of the pairs that are `boxed` (P,): of those that cover a pixel."""
        shares = area_share(masks)
        located = shares > 0
        self._add(name, "pairs_without_box", boxed.float(), ~boxed)
        self._add(name, "pairs_with_empty_boxes", located.float(), boxed & ~located)
        epg, without = energy_pointing_game(maps, masks), without_energy(maps)
        for key, values, undefined in (
            ("epg", epg, without),
            ("size_corrected_epg", size_corrected(epg, shares), without | (shares == 1)),
            ("iou", attribution_iou(maps, masks), without_union(maps, masks)),
        ):
            self._add_by_size(name, key, values, undefined, shares, located)

    def _add_by_size(self, name: str, key: str, values: Tensor, undefined: Tensor, shares: Tensor, chosen: Tensor) -> None:
        """Adds a score (P,) of the pairs that are `chosen`, and of those of each of BOX_SIZES."""
        self._add(name, key, values[chosen], undefined[chosen])
        for size, (least, most) in BOX_SIZES.items():
            of_size = chosen & (shares > least) & (shares <= most)
            if of_size.any():
                self._add(name, f"{key}_{size}", values[of_size], undefined[of_size])

    def _add(self, name: str, key: str, values: Tensor, undefined: Tensor) -> None:
        self._metric(name, key).update(values, undefined)

    def _metric(self, name: str, key: str) -> Metric:
        make = UnexplainedShare if key.startswith("unexplained_share") else LocalisationMetric
        if key not in self.metrics[name]:
            self.metrics[name][key] = make().to(self.device)
        return self.metrics[name][key]


class StudentScores:
    """Agreement of a student with its teacher, and the similarity of their explanations where these compare."""

    def __init__(self, student: ExplainedModel, teacher: ExplainedModel, device: torch.device) -> None:
        size, held = student.spec.image_size, student.spec.kind == teacher.spec.kind == "bcos"
        probe = torch.full((1, 6, size, size), 0.5, device=device)
        self.models = (student.model, teacher.model)
        self.explain: tuple[Explainer, Explainer] | None = None
        with suppress(ModelError):  # no GradCAM of one of the two
            self.explain = comparable_explainers(*self.models, probe, held=held)
        self.agreement, self.similarity = Agreement().to(device), LocalisationMetric().to(device)

    def update(self, images: Tensor, logits: Tensor, teacher_logits: Tensor) -> None:
        """Takes a batch of images (N, 3, H, W) and both models' logits of it."""
        self.agreement.update(logits, teacher_logits)
        if self.explain is None:
            return
        images, targets = add_inverse(images), teacher_logits.argmax(1)
        one, other = (explain(model, images, targets)[1] for explain, model in zip(self.explain, self.models, strict=True))
        empty = (one.flatten(1) == 0).all(1) | (other.flatten(1) == 0).all(1)
        self.similarity.update(explanation_similarity(one, other), empty)

    def compute(self) -> dict[str, float]:
        """The means over all workers; in how many pairs of maps one is zero."""
        found = {"agreement": float(self.agreement.compute())}
        if self.explain is None:
            return found
        similarity = self.similarity.compute()
        found["explanation_similarity"] = float(similarity["mean"])
        return found | {"explanation_similarity_undefined": int(similarity["undefined"])}
