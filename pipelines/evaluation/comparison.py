"""Evaluation of several trained models on the same images and grids.

Runs on any number of workers. Each evaluates its part of the split and of the grids, and the results are
combined.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from pipelines.attribution import Attribution
from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.batch import NO_GROUP
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.batches import labels_of
from pipelines.evaluation.explained_model import load_explained_model
from pipelines.evaluation.grids import grid_windows, play_grid_pointing_game
from pipelines.evaluation.predictions import Predictions
from pipelines.evaluation.scores import Scores, StudentScores
from pipelines.evaluation.thresholds import choose_thresholds
from pipelines.metrics import measured, multiclass_metrics
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
) -> tuple[dict[str, Any], Predictions]:
    """Evaluates models on `split`; returns their metrics and predictions, the same on every worker.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of each model.
        shards: root of the labelled data.
        data: how shards are read.
        params: batch size, post-hoc methods, grids.
        split: evaluated split.
        teacher: name of one of the models. The others are its students and also get `agreement` and
            `explanation_similarity`, the latter for the class that the teacher predicts.
        guided: the attribution used in guidance, evaluated for all models. Guided models decide on each class
            separately, so single-label data gets F1, precision, recall and mean average precision, too.

    Returns:
        `{"models": {name: {"accuracy", ..., "explanations": {name: {"gridpg", "epg", ...}}}}, "grids": {...},
        "images": N, "skipped": n}` with fractions in [0, 1], and the predictions. Metrics that could not be
        measured are absent. `iou` is at the best threshold on the validation split per model and explanation,
        `iou_at_0.5` at 0.5.

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
    thresholds = None if split == "val" else choose_thresholds(context, models, shards, data, params)
    batches = partial(loader, shards, split, data, params.batch_size)
    single = [name for name, explained in models.items() if explained.spec.task == "multiclass"]
    accuracy = {
        name: multiclass_metrics(len(models[name].spec.classes)).to(context.device) for name in single
    }
    scores = {name: Scores(explained, context.device) for name, explained in models.items()}
    students = [name for name in models if teacher is not None and name != teacher]
    student_scores = {
        name: StudentScores(models[name], models[str(teacher)], context.device) for name in students
    }
    seen: list[Predictions] = []
    mine = batches(context=context)
    for batch in mine:
        batch = to_device(batch, context.device)
        logits = {name: scores[name].update(batch) for name in models}
        for name in single:
            accuracy[name].update(logits[name], batch["label"])
        for name, of_student in student_scores.items():
            of_student.update(batch["image"], logits[name], logits[str(teacher)])
        groups = batch.get("group", torch.full((len(batch["key"]),), NO_GROUP))
        seen.append(
            Predictions(
                batch["key"],
                labels_of(batch).cpu(),
                {name: each.cpu() for name, each in logits.items()},
                groups.cpu(),
            )
        )
    predictions = Predictions.joined([part for of_worker in gather(seen, context) for part in of_worker])
    results: dict[str, Any] = {
        name: {
            **(measured(accuracy[name].compute()) if name in single else {}),
            **(predictions.decisions(name) if name not in single or guided is not None else {}),
            **predictions.group_accuracies(name),
            **(student_scores[name].compute() if name in student_scores else {}),
            "explanations": scores[name].compute(context, None if thresholds is None else thresholds[name]),
        }
        for name in models
    }
    found: dict[str, Any] = {
        "models": results,
        "images": len(predictions.keys),
        "skipped": sum(gather(mine.skipped, context)),
    }
    if len(single) == len(models):
        found["grids"], of_grids = play_grid_pointing_game(context, models, predictions, batches, params)
        for name, explained in models.items():
            results[name]["grid_windows"] = grid_windows(explained, params)
            for explanation, values in of_grids[name].items():
                results[name]["explanations"][explanation] |= values
    return found, predictions


def evaluate_with_correctness(
    context: Context, directories: Mapping[str, str], *arguments: Any
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Metrics of `evaluate`, and key -> True if the last model is correct; plain values for `launch`."""
    found, predictions = evaluate(context, directories, *arguments)
    return found, predictions.correct(list(directories)[-1])
