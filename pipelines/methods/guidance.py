"""Model guidance: trains a classifier so that its explanations lie inside the boxes of its classes.

Shapes: N images of H x W pixels, K classes, P pairs of an image and a class, n boxes. Boxes are rows
[image, class, xmin, ymin, xmax, ymax], in pixels, half-open.

Source: Rao et al., Studying How to Efficiently and Effectively Guide Models with Explanations, ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from pipelines import models
from pipelines.attribution import Attribution, explain, explain_pairs
from pipelines.bcos import add_inverse, check_held
from pipelines.bcos.precision import widened
from pipelines.data.loading.batch import Batch
from pipelines.losses import energy_loss, l1_loss, ppce_loss, rrr_loss, size_corrected_energy_loss
from pipelines.methods.method import Classification
from pipelines.metrics import Accuracy, IoU, PointingGame, box_masks, multilabel_metrics, select_boxes
from pipelines.models import ModelError, ModelSpec

if TYPE_CHECKING:
    from pipelines.params import GuidanceParams

LOCALISATION: dict[str, Callable[..., Tensor]] = {
    "energy": energy_loss,
    "l1": l1_loss,
    "rrr": rrr_loss,
    "ppce": ppce_loss,
    "size_corrected_energy": size_corrected_energy_loss,
}


class ObjectClassification(Classification):
    """Classification before guidance: binary cross-entropy over K independent classes.

    The loss is the same if images have only one label; its target is then one-hot.
    """

    def targets(self, batch: Batch) -> Tensor:
        """Returns labels (N, K) of {0, 1}."""
        targets = super().targets(batch)
        return targets if targets.ndim == 2 else F.one_hot(targets, self.num_classes).float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.binary_cross_entropy_with_logits(model(batch["image"]), batch["target"])}

    def metrics(self) -> Any:
        """Returns `f1`, `precision` and `recall` at logit >= 0, and `accuracy` if images have one label."""
        kinds: dict[str, Metric | MetricCollection] = dict(multilabel_metrics(self.num_classes).items())
        if self.task == "multiclass":
            kinds["accuracy"] = _AccuracyOfOneHot()
        return MetricCollection(kinds, compute_groups=False)


class _AccuracyOfOneHot(Accuracy):
    """Accuracy for one-hot labels (N, K)."""

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        super().update(preds, target.argmax(1))


class Guidance(ObjectClassification):
    """BCE(logits, labels) + λ·Σ_i L_loc(A_i, M_i) (eq. 1).

    A_i is the attribution of image i for one class, which is drawn uniformly from the image's labels at each
    step. M_i is the union of the image's boxes of this class. Images without labels, or without a box of the
    drawn class, have no L_loc. The sum, as in the paper whose λ are used, runs over all images of a step, on
    all workers.

    Args:
        module, task, num_classes: see `Classification`.
        params: the localisation loss, its weight λ, and the attribution.
        annotated: keys of the training images whose boxes are used; `None` for all images.
    """

    fields: tuple[str, ...] = ("boxes",)

    def __init__(
        self,
        module: nn.Module,
        task: str,
        num_classes: int,
        params: GuidanceParams,
        annotated: Iterable[str] | None = None,
    ) -> None:
        super().__init__(module, task, num_classes)
        self.params = params
        self.annotated = None if annotated is None else frozenset(annotated)
        self.attribution = Attribution(params.attribution, params.layer)
        options = {"alpha": params.alpha} if params.loss == "size_corrected_energy" else {}
        self.localisation = partial(LOCALISATION[params.loss], **options)
        self.losses = (
            "loss",
            "classification",
            *(("localisation",) if params.localisation_weight > 0 else ()),
        )

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `image` (N, 6, H, W), `target` (N, K), and if there are boxes `class`, `mask` and `count`.

        `class` (N,) is drawn from each image's labels, and `mask` (N, H, W) of bool is the union of the boxes
        of this class. Each element of `count` (N,) is the number of images in the step, over all workers.
        They are absent if λ = 0 or no annotated image of the batch has a box. Nothing here waits for a GPU.
        """
        made = super().prepare(batch)
        if self.params.localisation_weight == 0:
            return made
        drawn, size = draw_classes(made["target"]), (batch["image"].shape[-2], batch["image"].shape[-1])
        boxes = batch["boxes"]
        if self.annotated is not None:
            annotated = torch.tensor([key in self.annotated for key in batch["key"]])
            boxes = boxes[annotated[boxes[:, 0].long()]]
        if not len(boxes):
            return made
        masks = box_masks(dilated(boxes, self.params.dilation, size), drawn, size)
        count = drawn.new_ones(len(drawn), dtype=torch.float32) * batch.get(
            "step_images", self.params.optim.batch_size
        )
        return {
            **made,
            "class": drawn,
            "mask": masks & made["target"].bool().any(1)[:, None, None],
            "count": count,
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `loss`, `classification`, and if λ > 0 `localisation`, the mean L_loc over all images.

        Images without L_loc count as 0 in this mean.
        """
        if "mask" not in batch:
            classification = super().loss(model, batch)["loss"]
            losses = {"loss": classification, "classification": classification}
            return (
                losses
                if self.params.localisation_weight == 0
                else losses | {"localisation": torch.zeros_like(classification)}
            )
        images, masks = batch["image"], batch["mask"]
        logits, maps = explain(
            model, images, batch["class"], self.attribution, create_graph=True, resize=False
        )
        each = torch.where(masks.flatten(1).any(1), self.localisation(widened(maps), masks), 0.0)
        classification = F.binary_cross_entropy_with_logits(logits, batch["target"])
        # The step averages losses over its images, so `count` times this average is the sum over them.
        together = self.params.localisation_weight * (each * batch["count"]).mean()
        return {
            "loss": classification + together,
            "classification": classification,
            "localisation": each.mean(),
        }

    def metrics(self) -> Any:
        """Returns the metrics of classification, `epg`, and the figures of `IoU`, over pairs with a box."""
        kinds: dict[str, Metric | MetricCollection] = dict(super().metrics().items())
        return MetricCollection(kinds | {"epg": PointingGame(), "iou": IoU()}, compute_groups=False)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Adds an evaluation batch; only pairs of an image and a class with a box are explained."""
        targets = self.targets(batch)
        images, size = add_inverse(batch["image"]), (batch["image"].shape[-2], batch["image"].shape[-1])
        rows, classes = targets.bool().nonzero(as_tuple=True)
        masks = box_masks(select_boxes(batch["boxes"], rows, classes), classes, size)
        located = masks.flatten(1).any(1)
        present = torch.zeros_like(targets, dtype=torch.bool)
        present[rows[located], classes[located]] = True
        logits, maps = self._explain_pairs(model, images, present)
        metrics.update(preds=logits, target=targets.long(), attributions=widened(maps), masks=masks[located])

    def _explain_pairs(self, model: nn.Module, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (N, K) and maps (P, H, W) of the pairs that are True in `present` (N, K).

        Images without a pair take a plain forward pass, which is cheaper than an explanation.
        """
        explained, explain_some = present.any(1), partial(explain, model, attribution=self.attribution)
        if explained.all():
            logits, maps = explain_pairs(explain_some, images, present)
            return logits, maps
        logits, maps = images.new_zeros(present.shape), images.new_zeros(len(images), *images.shape[-2:])[:0]
        logits[~explained] = model(images[~explained]).to(logits)
        if explained.any():
            of_explained, maps = explain_pairs(explain_some, images[explained], present[explained])
            logits[explained] = of_explained.to(logits)
        return logits, maps


def draw_classes(targets: Tensor) -> Tensor:
    """Draws one class per image uniformly from its labels: (N, K) of {0, 1} -> (N,).

    For an image without labels the class is drawn from all K. This is the draw of `torch.multinomial` without
    its checks, which wait for a GPU.
    """
    weights = torch.where(targets.sum(1, keepdim=True) > 0, targets, 1.0)
    return (weights / torch.empty_like(weights).exponential_()).argmax(1)


def dilated(boxes: Tensor, share: float, size: tuple[int, int]) -> Tensor:
    """Moves each side of boxes (n, 6) out by int(share·width or height), and clips them to `size` (H, W)."""
    height, width = size
    image, label, xmin, ymin, xmax, ymax = boxes.unbind(1)
    by_x, by_y = ((xmax - xmin) * share).floor(), ((ymax - ymin) * share).floor()
    least, most = [(xmin - by_x).clamp_min(0), (ymin - by_y).clamp_min(0)], [xmax + by_x, ymax + by_y]
    return torch.stack([image, label, *least, most[0].clamp_max(width), most[1].clamp_max(height)], dim=1)


def classifier_spec(backbone: Path, classes: Sequence[str], task: str, image_size: int) -> ModelSpec:
    """Returns the spec of a classifier of `classes` with the network and design of the backbone's model.

    A B-cos network keeps the logit bias that it was trained with, as Rao et al. keep ImageNet's.
    """
    model, spec = models.load(backbone)
    design = {**spec.design, "logit_bias": float(model.logit_bias)} if spec.kind == "bcos" else spec.design  # type: ignore[arg-type]
    return replace(spec, classes=tuple(classes), task=task, image_size=image_size, design=design)  # type: ignore[arg-type]


def build_classifier(spec: ModelSpec, backbone: str | Path, seed: int) -> ObjectClassification:
    """Builds the classification before guidance, with the backbone's weights and a head drawn with `seed`."""
    torch.manual_seed(seed)
    return ObjectClassification(models.load_backbone(backbone, spec), spec.task, len(spec.classes))


def build_guidance(
    classifier: str | Path, params: GuidanceParams, annotated: Iterable[str] | None = None
) -> Guidance:
    """Builds the guidance of the model in the folder `classifier`.

    Args:
        classifier: folder of the model, as `models.save` writes it.
        params: see `Guidance`.
        annotated: see `Guidance`.

    Raises:
        ModelError, ConversionError: see `check_guidable`.
    """
    module, spec = models.load(classifier)
    method = Guidance(module, spec.task, len(spec.classes), params, annotated)
    method.attribution = check_guidable(module, spec, params)
    return method


def check_guidable(module: nn.Module, spec: ModelSpec, params: GuidanceParams) -> Attribution:
    """Returns the attribution of `params` for this model, GradCAM's default layer resolved to its name.

    Raises:
        ModelError: this kind of model does not have the attribution, or the layer does not exist (the message
            has the nearest names).
        ConversionError: explanation mode cannot hold the factors of a part of a B-cos network.
    """
    if spec.kind == "conventional" and params.attribution == "bcos":
        raise ModelError(
            "attribution: a conventional network has no dynamic weights: "
            "choose input_x_gradient, integrated_gradients or gradcam"
        )
    probe = torch.full((2, 6, spec.image_size, spec.image_size), 0.5)
    if spec.kind == "bcos":
        check_held(module, probe)
    try:
        attribution = Attribution(params.attribution, params.layer).resolved(module, probe)
        explain(module, probe, torch.zeros(2, dtype=torch.long), attribution)
    except ValueError as error:
        raise ModelError(f"layer: {error}") from None
    return attribution
