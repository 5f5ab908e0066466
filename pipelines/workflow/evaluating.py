"""Collects the models that a stage evaluates, names them for reports, and evaluates them on workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation import evaluate_splits
from pipelines.evidence import Records, intervals
from pipelines.models import load_published, save
from pipelines.params import Params, ParamsError, keyed
from pipelines.storage.files import write_json
from pipelines.training import launch
from pipelines.workflow.places import BCOS_NAMES, model_folder
from pipelines.workflow.sharing import models_for_all, shards_for_all

CODE = ("pipelines.evaluation", "pipelines.workflow.evaluating")  # modules that compute an evaluation
# Names that a published network may not have.
OWN_NAMES = {"conventional", *BCOS_NAMES.values(), "teacher", "kd", "e2kd", "shards", "pretrain", *BCOS_NAMES}


def classifiers(params: Params, classes: Sequence[str]) -> dict[str, Path]:
    """Returns the folders of the published, conventional and B-cos networks, by their names in reports."""
    return published_models(params, classes) | trained_classifiers(params)


def trained_classifiers(params: Params) -> dict[str, Path]:
    """Returns the folders of the conventional and B-cos networks of this run, by their names in reports."""
    own = {"conventional": "pretrain"} | {
        BCOS_NAMES[start]: f"bcosify/{start}" for start in params.bcosify.starts
    }
    return {name: model_folder(folder) for name, folder in own.items()}


def students(params: Params) -> dict[str, Path]:
    """Returns the folders of the teacher and its students, by their names in reports."""
    folders = {"teacher": "teacher"} | {run: f"distill/{run}" for run in params.distill.runs}
    return {name: model_folder(folder) for name, folder in folders.items()}


def published_models(params: Params, classes: Sequence[str]) -> dict[str, Path]:
    """Builds the published networks from their checkpoints and returns their folders, by name.

    `classes` are the class names of the data.
    """
    folders = {}
    for name, published in params.evaluate.published.items():
        if name in OWN_NAMES:
            raise ParamsError(
                f"evaluate.published.{name}: something of this run has that name already: give it another"
            )
        model, spec = load_published(
            published.name, published.weights, classes=tuple(classes), sha256=published.sha256
        )
        folders[name] = model_folder(f"published/{name}")
        save(folders[name], model, spec)
    return folders


def evaluate_models(
    params: Params, folders: Mapping[str, Path], splits: Sequence[str], *options: Any
) -> dict[str, Records]:
    """Split -> records of the models in `folders`, evaluated on `evaluate.workers` workers.

    `options` are the arguments of `evaluate_splits` after the splits.
    """
    training = params.training.with_loader(params.data.loader_workers).model_copy(
        update={"workers": params.evaluate.workers}
    )
    where = (models_for_all(params, folders), shards_for_all(params), params.data, params.evaluate)
    with keyed("training", training):
        return launch(
            evaluate_splits, *where, splits, *options, training=training, storage=params.storage.root
        )


def save_records(folder: Path, records: Mapping[str, Records]) -> None:
    """Writes the records of each split, and the intervals of their headline figures, to `folder`/SPLIT."""
    for split, of_split in records.items():
        of_split.save(folder / split)
        write_json(folder / split / "intervals.json", intervals(of_split))
