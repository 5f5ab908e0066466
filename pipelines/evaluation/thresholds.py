"""The choice of the IoU threshold on the validation split, per model and explanation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas

from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.distributed import Context, to_device
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.evaluation.scores import IOU, score_explanations
from pipelines.evaluation.tables import joined
from pipelines.evidence import OF_EXPLANATIONS
from pipelines.metrics import THRESHOLDS
from pipelines.params import DataParams, EvaluateParams

Thresholds = dict[tuple[str, str], float]  # (model, explanation) -> threshold


def choose_thresholds(
    context: Context,
    models: Mapping[str, ExplainedModel],
    shards: str,
    data: DataParams,
    params: EvaluateParams,
) -> Thresholds:
    """The threshold with the highest mean IoU on the validation split, for each model and explanation.

    The result is the same on every worker. It has no thresholds if the validation split has no boxes.
    """
    if "boxes" not in read_manifest(shards).fields.get("val", ()):
        return {}
    tables = []
    for batch in loader(shards, "val", data, params.batch_size, context=context, fields=("boxes",)):
        batch = to_device(batch, context.device)
        tables += [score_explanations(each, batch)[1].assign(model=name) for name, each in models.items()]
    return best_thresholds(joined(tables, context, OF_EXPLANATIONS))


def best_thresholds(rows: pandas.DataFrame) -> Thresholds:
    """The thresholds with the highest mean IoU over rows of `Records.explanations`, the lowest of equals."""
    if "box_share" not in rows:
        return {}
    found = {}
    for (model, explanation), of in rows[rows["box_share"] > 0].groupby(["model", "explanation"]):
        means = of[IOU].to_numpy(np.float64).mean(0)
        if of["has_union"].any() and not np.isnan(means).any():
            found[str(model), str(explanation)] = THRESHOLDS[means.argmax()]
    return found


def with_iou(rows: pandas.DataFrame, thresholds: Thresholds) -> pandas.DataFrame:
    """Adds the columns `iou_threshold` and `iou` of rows whose explanation has a threshold."""
    if not thresholds or "box_share" not in rows:
        return rows
    chosen = [thresholds.get(pair, np.nan) for pair in zip(rows["model"], rows["explanation"], strict=True)]
    at = pandas.Series(chosen, index=rows.index)
    iou = pandas.Series(np.nan, index=rows.index, dtype=np.float32)
    for threshold, column in zip(THRESHOLDS, IOU, strict=True):
        iou = iou.where(at != threshold, rows[column])
    return rows.assign(iou_threshold=at, iou=iou)
