"""Pictures of a seeded sample of correctly and wrongly classified images with all explanations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipelines.attribution import Attribution, explain
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights, rgba
from pipelines.data.loading.loader import loader
from pipelines.evaluation import ExplainedModel, examples_by_key, load_explained_model
from pipelines.evaluation.pictures import Column, choose, save_panels
from pipelines.params import DataParams, EvaluateParams

ROWS = 4  # images per file


def draw_gallery(
    folder: Path,
    directories: Mapping[str, str | Path],
    correct: Mapping[str, bool],
    shards: str,
    data: DataParams,
    params: EvaluateParams,
    split: str = "test",
    guided: Attribution | None = None,
) -> list[Path]:
    """Writes panels of `params.pictures` images to `folder`; returns their paths.

    Args:
        folder: folder of the panels; created if missing.
        directories: name -> folder of each model. Each model explains the class that it predicts.
        correct: key -> True if the prediction is correct, see `Predictions.correct`. Half of the images, or
            as many as there are, are drawn (`params.seed`) from the wrong ones.
        shards, data, params, split, guided: as in `evaluate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = {
        name: load_explained_model(path, params.posthoc, torch.device("cpu"), guided)
        for name, path in directories.items()
    }
    keys = list(correct)
    chosen = [
        keys[index]
        for index in choose(torch.tensor(list(correct.values())), params.pictures, params.seed).tolist()
    ]
    examples = examples_by_key(partial(loader, shards, split, data, params.batch_size), set(chosen))
    names = next(iter(models.values())).spec.classes
    paths = []
    for start in range(0, len(chosen), ROWS):
        rows = {key: examples[key] for key in chosen[start : start + ROWS]}
        batch = add_inverse(torch.stack([row.image for row in rows.values()]) / 255)
        columns = [
            column
            for name, explained in models.items()
            for column in explain_predicted(name, explained, batch, params.smooth)
        ]
        titles = [
            f"{key}\ntrue: {', '.join(names[label] for label in row.classes)}" for key, row in rows.items()
        ]
        paths.append(folder / f"panels-{start // ROWS:02d}.png")
        save_panels(paths[-1], batch, columns, titles, [row.boxes for row in rows.values()])
    return paths


def explain_predicted(name: str, explained: ExplainedModel, images: Tensor, smooth: int) -> list[Column]:
    """Explanations of the classes that the model `name` predicts for images (N, 6, H, W) in [0, 1].

    Titles name the class with its logit and probability. The contributions of a B-cos model have one scale.
    """
    with torch.no_grad():
        logits = explained.model(images)
    targets = logits.argmax(1)
    shares = logits.softmax(1) if explained.spec.task == "multiclass" else logits.sigmoid()
    predicted = [
        f"{explained.spec.classes[target]} {logits[row, target]:+.2f} ({shares[row, target]:.0%})"
        for row, target in enumerate(targets.tolist())
    ]

    def column(title: str, maps: Tensor, contributions: bool = False) -> Column:
        return Column(maps, [f"{name}\n{title}\n{guess}" for guess in predicted], contributions)

    columns: list[Column] = []
    if explained.spec.kind == "bcos":
        _, weights = dynamic_weights(explained.model, images, targets)
        columns = [
            column("weights", rgba(images, weights, smooth)),
            column("contributions", contribution_map(images, weights), contributions=True),
        ]
    for title, attribution in explained.explanations.items():
        if not attribution.of_dynamic_weights:
            columns.append(column(title, explain(explained.model, images, targets, attribution)[1]))
    return columns
