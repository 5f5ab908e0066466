"""Which models a stage evaluates, under which names in reports, and on which workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation import evaluate_with_correctness
from pipelines.models import load_published, save
from pipelines.params import Params, ParamsError, keyed
from pipelines.training import launch
from pipelines.workflow.places import model_folder, models_for_all, shards_for_all

CODE = ("pipelines.evaluation", "pipelines.workflow.evaluating")  # modules that compute an evaluation
BCOS_NAMES = {
    "pretrained": "bcosified",
    "scratch": "bcos_from_scratch",
}  # start of a B-cos network -> its name in reports
OWN_NAMES = {"conventional", *BCOS_NAMES.values(), "teacher", "kd", "e2kd", "shards", "pretrain", *BCOS_NAMES}


def classifiers(params: Params, classes: Sequence[str]) -> dict[str, Path]:
    """Folders of the published networks, the conventional model and the B-cos networks, by their names in reports."""
    own = {"conventional": "pretrain"} | {
        BCOS_NAMES[start]: f"bcosify/{start}" for start in params.bcosify.starts
    }
    return published_models(params, classes) | {name: model_folder(folder) for name, folder in own.items()}


def students(params: Params) -> dict[str, Path]:
    """Folders of the teacher and its students, by their names in reports."""
    folders = {"teacher": "teacher"} | {run: f"distill/{run}" for run in params.distill.runs}
    return {name: model_folder(folder) for name, folder in folders.items()}


def published_models(params: Params, classes: Sequence[str]) -> dict[str, Path]:
    """Folders of the published networks, by name, made here from their checkpoints; `classes` are those of the data."""
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
    params: Params, folders: Mapping[str, Path], *arguments: Any
) -> tuple[dict[str, Any], dict[str, bool]]:
    """`evaluate_with_correctness` of the models in `folders` on `evaluate.workers`; `arguments` follow the params."""
    training = params.training.with_loader(params.data.loader_workers).model_copy(
        update={"workers": params.evaluate.workers}
    )
    where = (models_for_all(params, folders), shards_for_all(params), params.data, params.evaluate)
    with keyed("training", training):
        return launch(
            evaluate_with_correctness, *where, *arguments, training=training, storage=params.storage.root
        )
