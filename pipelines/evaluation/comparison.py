"""Evaluation of several trained models on the same images and grids.

Runs on any number of workers. Each evaluates its part of the split and of the grids, and the results are
combined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas
import torch

from pipelines.attribution import Attribution
from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.batch import NO_GROUP
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.batches import labels_of
from pipelines.evaluation.explained_model import ExplainedModel, load_explained_model
from pipelines.evaluation.grids import grid_windows, play_grid_pointing_game
from pipelines.evaluation.predictions import Predictions
from pipelines.evaluation.scores import Similarity, score_explanations
from pipelines.evaluation.tables import joined
from pipelines.evaluation.thresholds import best_thresholds, choose_thresholds, with_iou
from pipelines.evidence import OF_EXPLANATIONS, OF_GRIDS, Records
from pipelines.params import DataParams, EvaluateParams


@exact_float32()
def evaluate(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: EvaluateParams,
    split: str = "test",
    teacher: str | None = None,
    guided: Attribution | None = None,
    validation: Records | None = None,
) -> Records:
    """Evaluates models on `split`; the records are the same on every worker.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of each model.
        shards: root of the labelled data.
        data: how shards are read.
        params: batch size, post-hoc methods, grids.
        split: evaluated split.
        teacher: name of one of the models. The others are its students, and their explanations of the class
            that the teacher predicts are compared with the teacher's.
        guided: the attribution used in guidance, evaluated for all models. Guided models decide on each class
            separately, so single-label data gets F1, precision, recall and mean average precision, too.
        validation: records of the same models on the validation split, which give the thresholds of IoU. If
            `None`, the explanations of that split are computed for the thresholds alone.

    Raises:
        DataError: no image to evaluate, or images without labels.
    """
    if not read_manifest(shards).labelled:
        raise DataError(
            f"{shards}: images without labels cannot be evaluated; "
            "students' agreement on val is in their reports"
        )
    models = {
        name: load_explained_model(path, params.posthoc, context.device, guided)
        for name, path in directories.items()
    }
    batches = partial(loader, shards, split, data, params.batch_size)
    predictions, rows, compared, skipped = _score_images(context, models, batches, teacher)
    tasks = {name: explained.spec.task for name, explained in models.items()}
    images = [predictions.table(name, task) for name, task in tasks.items()]
    of_images = pandas.concat(images, ignore_index=True)
    if split == "val" or validation is not None:
        thresholds = best_thresholds(rows if validation is None else validation.explanations)
    else:
        thresholds = choose_thresholds(context, models, shards, data, params)
    if len(rows):
        shared = of_images[["model", "key", "group", "prediction", "right"]]
        rows = with_iou(rows, thresholds).merge(shared, on=["model", "key"])
    if len(compared):
        of_images = of_images.merge(compared, on=["model", "key"], how="left")
    plays, grids = set(tasks.values()) == {"multiclass"}, pandas.DataFrame(columns=OF_GRIDS)
    if plays:
        grids = play_grid_pointing_game(context, models, predictions, batches, params)
    return Records(
        of_images,
        rows,
        grids,
        {
            "split": split,
            "tasks": tasks,
            "single_label": predictions.labels.ndim == 1,
            "decisions": guided is not None,
            "teacher": teacher,
            "side": params.grid_size,
            "windows": {name: grid_windows(of, params) for name, of in models.items()} if plays else {},
            "skipped": skipped,
        },
    )


def _score_images(
    context: Context, models: Mapping[str, ExplainedModel], batches: Any, teacher: str | None
) -> tuple[Predictions, pandas.DataFrame, pandas.DataFrame, int]:
    """One pass over the images of a split, shared by all workers.

    Returns:
        The predictions; rows of `Records.explanations`; rows with the columns of `Similarity` by model and
        key, for the students of `teacher`; and the number of images that do not decode.
    """
    similarity = {
        name: Similarity(models[name], models[teacher], context.device)
        for name in models
        if teacher is not None and name != teacher
    }
    seen: list[Predictions] = []
    explanations: list[pandas.DataFrame] = []
    similarities: list[pandas.DataFrame] = []
    mine = batches(context=context)
    for batch in mine:
        batch, logits = to_device(batch, context.device), {}
        for name, explained in models.items():
            logits[name], rows = score_explanations(explained, batch)
            explanations.append(rows.assign(model=name))
        for name, compare in similarity.items():
            columns = compare(batch["image"], logits[str(teacher)])
            arrays = {column: values.cpu().numpy() for column, values in columns.items()}
            similarities.append(pandas.DataFrame({"model": name, "key": batch["key"], **arrays}))
        groups = batch.get("group", torch.full((len(batch["key"]),), NO_GROUP))
        kept = {name: each.cpu() for name, each in logits.items()}
        seen.append(Predictions(batch["key"], labels_of(batch).cpu(), kept, groups.cpu()))
    return (
        Predictions.joined([part for of_worker in gather(seen, context) for part in of_worker]),
        joined(explanations, context, OF_EXPLANATIONS),
        joined(similarities, context, ["model", "key"]),
        sum(gather(mine.skipped, context)),
    )


def evaluate_splits(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: EvaluateParams,
    splits: Sequence[str],
    teacher: str | None = None,
    guided: Attribution | None = None,
) -> dict[str, Records]:
    """Split -> records of `evaluate`. Those of `val`, if it is asked for, give the thresholds of IoU."""
    found: dict[str, Records] = {}
    for split in sorted(set(splits), key=lambda split: (split != "val", split)):
        where = (directories, shards, data, params, split)
        found[split] = evaluate(context, *where, teacher, guided, found.get("val"))
    return found
