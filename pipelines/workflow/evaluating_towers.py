"""The image towers that the stage `evaluate_clip` evaluates, their data sets and their workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.evaluation.linear_probe import evaluate_linear_probe
from pipelines.evaluation.retrieval import evaluate_retrieval
from pipelines.evaluation.text2concept import evaluate_text2concept
from pipelines.evaluation.text_localisation import evaluate_text_localisation
from pipelines.evaluation.zero_shot import evaluate_zero_shot
from pipelines.params import Params, keyed
from pipelines.training import launch
from pipelines.workflow.places import model_folder
from pipelines.workflow.sharing import models_for_all, shards_for_all

# Modules that compute this evaluation.
CODE = ("pipelines.evaluation.text_gallery", "pipelines.workflow.evaluating_towers")


def towers(params: Params) -> dict[str, Path]:
    """Returns the folders of the original and B-cosified image towers, by their names in reports."""
    folders = {f"{tower}_original": f"image_text/{tower}" for tower in params.clip.towers}
    folders |= {f"{tower}_bcos": f"clip/{tower}" for tower in params.clip.towers}
    return {name: model_folder(folder) for name, folder in folders.items()}


def evaluate_towers(params: Params, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Returns zero-shot accuracy, linear probes, retrieval and text localisation of image towers.

    Each is measured on its data set of `clip`. The B-cos classifiers of `clip.evaluate.text2concept` are
    evaluated too, mapped into the embedding space of each original tower.
    """
    clip = params.clip
    evaluations: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
        "zero_shot": (evaluate_zero_shot, clip.labelled),
        "linear_probe": (evaluate_linear_probe, clip.labelled),
        "retrieval": (evaluate_retrieval, clip.pairs),
        "text_localisation": (evaluate_text_localisation, clip.located),
    }
    directories = models_for_all(params, folders)
    found = {
        name: _launched(params, dataset, evaluate, directories)
        for name, (evaluate, dataset) in evaluations.items()
    }
    classifiers = models_for_all(
        params, {name: Path(path).absolute() for name, path in clip.evaluate.text2concept.items()}
    )
    if classifiers:
        found["text2concept"] = {
            tower: _launched(
                params, clip.labelled, evaluate_text2concept, classifiers, directories[f"{tower}_original"]
            )
            for tower in clip.towers
        }
    return found


def _launched(
    params: Params, dataset: str, evaluate: Callable[..., dict[str, Any]], *models: Any
) -> dict[str, Any]:
    """Runs `evaluate` for `models` on `dataset`, on the workers of `clip.evaluate`."""
    clip = params.clip
    training = params.training.with_loader(clip.data.loader_workers).model_copy(
        update={"workers": clip.evaluate.workers}
    )
    shards = shards_for_all(params.for_clip(dataset))
    with keyed("training", training):
        found: dict[str, Any] = launch(
            evaluate,
            *models,
            shards,
            clip.data,
            clip.evaluate,
            training=training,
            storage=params.storage.root,
        )
        return found
