"""Model guidance: a classifier of the objects in an image, trained to put its explanation on them, from boxes.

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
    """The phase before guidance: binary cross-entropy, each class a decision of its own, also if images have one label."""

    def targets(self, batch: Batch) -> Tensor:
        """(N, K) of {0, 1}."""
        targets = super().targets(batch)
        return targets if targets.ndim == 2 else F.one_hot(targets, self.num_classes).float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a prepared batch."""
        return {"loss": F.binary_cross_entropy_with_logits(model(batch["image"]), batch["target"])}

    def metrics(self) -> Any:
        """`f1`, `precision`, `recall` at logit 0, and for one label an image `accuracy`."""
        kinds: dict[str, Metric | MetricCollection] = dict(multilabel_metrics(self.num_classes).items())
        if self.task == "multiclass":
            kinds["accuracy"] = _AccuracyOfOneHot()
        return MetricCollection(kinds, compute_groups=False)


class _AccuracyOfOneHot(Accuracy):
    """Accuracy, of labels (N, K) of which one is 1."""

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        super().update(preds, target.argmax(1))


class Guidance(ObjectClassification):
    """BCE(logits, labels) + λ·Σ_i L_loc(A_i, M_i) (eq. 1 and 2).

    A_i is the attribution of image i for one class, drawn uniformly from its labels at each step; M_i the union of this class's
    boxes. Images without labels, or without a box of the class, have no L_loc. The sum goes over the images of a step, those of
    all workers and parts, as it does where λ was published.

    Args:
        module, task, num_classes: as in `Classification`.
        params: the losses and the attribution.
        annotated: keys of the training images whose boxes are used; `None`: all of them.
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
        """`image`, `target` (N, K); if an annotated image has boxes `class` (N,), drawn from its labels, `mask` (N, H, W).

        With them comes `count` (N,), the number of images of the step. Nothing here waits for a GPU.
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
            "step_images", self.params.batch_size
        )
        return {
            **made,
            "class": drawn,
            "mask": masks & made["target"].bool().any(1)[:, None, None],
            "count": count,
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, and its parts: `classification`, and if λ > 0 `localisation`, the mean over all images, also unguided ones."""
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
        together = (
            self.params.localisation_weight * (each * batch["count"]).mean()
        )  # the mean times the count is the sum
        return {
            "loss": classification + together,
            "classification": classification,
            "localisation": each.mean(),
        }

    def metrics(self) -> Any:
        """Those of classification, and `epg` and `IoU`'s of the pairs of an image and a class that has a box."""
        kinds: dict[str, Metric | MetricCollection] = dict(super().metrics().items())
        return MetricCollection(kinds | {"epg": PointingGame(), "iou": IoU()}, compute_groups=False)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Takes an evaluation batch into `metrics`; only pairs with a box are explained."""
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
        """`explain_pairs`, without a graph for images that have no pair."""
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
    """A class of each image, drawn uniformly from its labels (without any, from all classes): (N, K) of {0, 1} -> (N,).

    The draw is that of torch's generator: what `torch.multinomial` does, but for its checks, which wait for a GPU.
    """
    weights = torch.where(targets.sum(1, keepdim=True) > 0, targets, 1.0)
    return (weights / torch.empty_like(weights).exponential_()).argmax(1)


def dilated(boxes: Tensor, share: float, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 6) [image, class, xmin, ymin, xmax, ymax] with sides moved out by int(share·width or height), within (H, W)."""
    height, width = size
    image, label, xmin, ymin, xmax, ymax = boxes.unbind(1)
    by_x, by_y = ((xmax - xmin) * share).floor(), ((ymax - ymin) * share).floor()
    least, most = [(xmin - by_x).clamp_min(0), (ymin - by_y).clamp_min(0)], [xmax + by_x, ymax + by_y]
    return torch.stack([image, label, *least, most[0].clamp_max(width), most[1].clamp_max(height)], dim=1)


def classifier_spec(backbone: Path, classes: Sequence[str], task: str, image_size: int) -> ModelSpec:
    """The spec of a classifier of other classes on the model in the folder `backbone`: its network, its design.

    A B-cos network keeps the logit bias that it was trained with (Rao et al. keep ImageNet's).
    """
    model, spec = models.load(backbone)
    design = {**spec.design, "logit_bias": float(model.logit_bias)} if spec.kind == "bcos" else spec.design  # type: ignore[arg-type]
    return replace(spec, classes=tuple(classes), task=task, image_size=image_size, design=design)  # type: ignore[arg-type]


def build_classifier(spec: ModelSpec, backbone: str | Path, seed: int) -> ObjectClassification:
    """Classification before guidance: the network of `spec` with the backbone's weights, and a head drawn by `seed`."""
    torch.manual_seed(seed)
    return ObjectClassification(models.load_backbone(backbone, spec), spec.task, len(spec.classes))


def build_guidance(
    classifier: str | Path, params: GuidanceParams, annotated: Iterable[str] | None = None
) -> Guidance:
    """Guidance of the model in the folder `classifier`.

    Args:
        classifier: where `models.save` left it.
        params: of the loss.
        annotated: keys of the training images whose boxes are used; `None`: all of them.

    Raises:
        ModelError, ConversionError: see `check_guidable`.
    """
    module, spec = models.load(classifier)
    method = Guidance(module, spec.task, len(spec.classes), params, annotated)
    method.attribution = check_guidable(module, spec, params)
    return method


def check_guidable(module: nn.Module, spec: ModelSpec, params: GuidanceParams) -> Attribution:
    """The attribution of `params` for the model that `spec` describes.

    Raises:
        ModelError: the attribution is not of this kind of model, or there is no such layer (the nearest names are given).
        ConversionError: a B-cos network has a part that explanation mode would not hold.
    """
    if spec.kind == "conventional" and params.attribution == "bcos":
        raise ModelError(
            "attribution: a conventional network has no dynamic weights: choose input_x_gradient, integrated_gradients or gradcam"
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
