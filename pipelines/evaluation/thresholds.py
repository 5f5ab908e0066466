"""The choice of the IoU threshold on the validation split, per model and explanation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pipelines.attribution import explain, explain_pairs
from pipelines.bcos import add_inverse
from pipelines.data.loading.batch import Batch
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.distributed import Context, to_device
from pipelines.evaluation.batches import present
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.metrics import IoU, box_masks, measured, select_boxes
from pipelines.params import DataParams, EvaluateParams

Thresholds = dict[str, float]  # name of an explanation -> threshold


def choose_thresholds(
    context: Context,
    models: Mapping[str, ExplainedModel],
    shards: str,
    data: DataParams,
    params: EvaluateParams,
) -> dict[str, Thresholds]:
    """Model -> explanation -> threshold with the highest mean IoU on the validation split.

    The result is the same on every worker. It has no thresholds if the validation split has no boxes.
    """
    if "boxes" not in read_manifest(shards).fields.get("val", ()):
        return {model: {} for model in models}
    metrics = {
        model: {name: IoU().to(context.device) for name in of.explanations} for model, of in models.items()
    }
    for batch in loader(shards, "val", data, params.batch_size, context=context, fields=("boxes",)):
        batch = to_device(batch, context.device)
        for model, explained in models.items():
            _update(metrics[model], explained, batch)
    found = {
        model: {name: measured(each.compute()) for name, each in of.items()} for model, of in metrics.items()
    }
    return {
        model: {name: values["iou_threshold"] for name, values in of.items() if "iou_threshold" in values}
        for model, of in found.items()
    }


def _update(metrics: Mapping[str, IoU], explained: ExplainedModel, batch: Batch) -> None:
    """Adds the (image, class) pairs whose boxes cover a pixel to the metric of each explanation."""
    images, in_image = add_inverse(batch["image"]), present(batch, len(explained.spec.classes))
    rows, targets = in_image.nonzero(as_tuple=True)
    masks = box_masks(
        select_boxes(batch["boxes"], rows, targets), targets, (images.shape[-2], images.shape[-1])
    )
    located = masks.flatten(1).any(1)
    for name, attribution in explained.explanations.items():
        _, maps = explain_pairs(partial(explain, explained.model, attribution=attribution), images, in_image)
        metrics[name].update(maps[located], masks[located])
