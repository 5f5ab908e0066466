"""The grid pointing game for several models, see `metrics.grid`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas
import torch
from torch import Tensor

from pipelines.attribution import Attribution, attribute
from pipelines.bcos import add_inverse
from pipelines.distributed import Context
from pipelines.evaluation.batches import examples_by_key
from pipelines.evaluation.explained_model import ExplainedModel, knows_positions
from pipelines.evaluation.predictions import Predictions
from pipelines.evaluation.tables import joined
from pipelines.evidence import OF_GRIDS
from pipelines.metrics import (
    Grid,
    confidence,
    draw_grids,
    eligible,
    grid_batches,
    grid_pointing_game,
    in_windows,
)
from pipelines.params import EvaluateParams


def play_grid_pointing_game(
    context: Context,
    models: Mapping[str, ExplainedModel],
    predictions: Predictions,
    batches: Any,
    params: EvaluateParams,
) -> pandas.DataFrame:
    """Plays the game; returns a row per grid, model, explanation and cell, see `Records.grids`.

    The game `gridpg` is played on the same grids for all models, whose images all models classify correctly
    with sigmoid(logit) > 0.5. `gridpg_own_grids` is played on each model's own grids, as published.
    """
    draw = partial(_draw, predictions, params)
    common = draw(list(models))
    played = {name: (common, draw([name])) for name in models}
    wanted = {
        index
        for pair in played.values()
        for grids in pair
        for grid in _share(context, grids)
        for index in grid.images
    }
    found = examples_by_key(batches, {predictions.keys[index] for index in wanted})
    table = {index: found[predictions.keys[index]].image for index in wanted}

    def images(indices: Sequence[int]) -> Tensor:
        return add_inverse(torch.stack([table[index] for index in indices]).to(context.device) / 255)

    tables = []
    for name, explained in models.items():
        for explanation, attribution in explained.explanations.items():
            explain_many = grid_explainer(explained, attribution)
            for game, grids in zip(("gridpg", "gridpg_own_grids"), played[name], strict=True):
                numbers = range(len(grids))[context.rank :: context.world_size]
                mine = _share(context, grids)
                scores = [
                    grid_pointing_game(explain_many, tiled, classes, params.smooth).cpu()
                    for tiled, classes in grid_batches(mine, images, params.grid_batch)
                ]
                cells = [
                    (number, cell, predictions.keys[image], label)
                    for number, grid in zip(numbers, mine, strict=True)
                    for cell, (image, label) in enumerate(zip(grid.images, grid.classes, strict=True))
                ]
                rows = pandas.DataFrame(cells, columns=["grid", "cell", "key", "class"])
                rows["score"] = torch.cat(scores).flatten().numpy() if scores else []
                tables.append(rows.assign(game=game, model=name, explanation=explanation))
    return joined(tables, context, OF_GRIDS)


def grid_windows(explained: ExplainedModel, params: EvaluateParams) -> int:
    """Number of windows in which a grid is explained."""
    return (2 * params.grid_size + 1) ** 2 if knows_positions(explained.model) else 1


def grid_explainer(explained: ExplainedModel, attribution: Attribution) -> Any:
    """Returns a function (grids (G, 6, H, W), classes (G, T)) -> maps (G, T, H, W).

    Models with absolute position embeddings are explained in windows of their own image size.
    """
    explain_many = partial(attribute, explained.model, method=attribution.method, layer=attribution.layer)
    return (
        in_windows(explain_many, explained.spec.image_size)
        if knows_positions(explained.model)
        else explain_many
    )


def _draw(predictions: Predictions, params: EvaluateParams, names: list[str]) -> list[Grid]:
    """Draws grids of images that all of the models `names` classify correctly."""
    logits = [predictions.logits[name] for name in names]
    return draw_grids(
        confidence(predictions.labels, *logits),
        predictions.labels,
        predictions.keys,
        eligible(predictions.labels, *logits),
        n=params.grid_size,
        count=params.grid_count,
        seed=params.seed,
    )


def _share(context: Context, grids: list[Grid]) -> list[Grid]:
    """Grids that this worker evaluates."""
    return grids[context.rank :: context.world_size]
