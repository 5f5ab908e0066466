"""Which models a stage evaluates, under which names in reports, and on which workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation import evaluate_with_correctness
from pipelines.evaluation.linear_probe import evaluate_linear_probe
from pipelines.evaluation.retrieval import evaluate_retrieval
from pipelines.evaluation.text_localisation import evaluate_text_localisation
from pipelines.evaluation.zero_shot import evaluate_zero_shot
from pipelines.models import load_published, save
from pipelines.params import Params, ParamsError, keyed
from pipelines.training import launch
from pipelines.workflow.places import model_folder, models_for_all, shards_for_all

CODE = ("pipelines.evaluation", "pipelines.workflow.evaluating")  # modules that compute an evaluation
BCOS_NAMES = {"pretrained": "bcosified", "scratch": "bcos_from_scratch"}  # start of a B-cos network -> its name in reports
OWN_NAMES = {"conventional", *BCOS_NAMES.values(), "teacher", "kd", "e2kd", "shards", "pretrain", *BCOS_NAMES}


def classifiers(params: Params, classes: Sequence[str]) -> dict[str, Path]:
    """Folders of the published networks, the conventional model and the B-cos networks, by their names in reports."""
    own = {"conventional": "pretrain"} | {BCOS_NAMES[start]: f"bcosify/{start}" for start in params.bcosify.starts}
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
            raise ParamsError(f"evaluate.published.{name}: something of this run has that name already: give it another")
        model, spec = load_published(published.name, published.weights, classes=tuple(classes), sha256=published.sha256)
        folders[name] = model_folder(f"published/{name}")
        save(folders[name], model, spec)
    return folders


def evaluate_models(params: Params, folders: Mapping[str, Path], *arguments: Any) -> tuple[dict[str, Any], dict[str, bool]]:
    """`evaluate_with_correctness` of the models in `folders` on `evaluate.workers`; `arguments` follow the params."""
    training = params.training.with_loader(params.data.loader_workers).model_copy(update={"workers": params.evaluate.workers})
    where = (models_for_all(params, folders), shards_for_all(params), params.data, params.evaluate)
    with keyed("training", training):
        return launch(evaluate_with_correctness, *where, *arguments, training=training, storage=params.storage.root)


def towers(params: Params) -> dict[str, Path]:
    """Folders of the image towers of the run, originals and B-cosified, by their names in reports."""
    folders = {f"{tower}_original": f"image_text/{tower}" for tower in params.clip.towers}
    folders |= {f"{tower}_bcos": f"clip/{tower}" for tower in params.clip.towers}
    return {name: model_folder(folder) for name, folder in folders.items()}


def evaluate_towers(params: Params, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Zero-shot accuracy, linear probes, retrieval and text localisation of image towers, each on its data set of `clip`."""
    clip = params.clip
    evaluations: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
        "zero_shot": (evaluate_zero_shot, clip.labelled),
        "linear_probe": (evaluate_linear_probe, clip.labelled),
        "retrieval": (evaluate_retrieval, clip.pairs),
        "text_localisation": (evaluate_text_localisation, clip.located),
    }
    training = params.training.with_loader(clip.data.loader_workers).model_copy(update={"workers": clip.evaluate.workers})
    directories = models_for_all(params, folders)
    with keyed("training", training):
        return {
            name: launch(
                evaluate,
                *(directories, shards_for_all(params.for_clip(dataset)), clip.data, clip.evaluate),
                training=training,
                storage=params.storage.root,
            )
            for name, (evaluate, dataset) in evaluations.items()
        }
