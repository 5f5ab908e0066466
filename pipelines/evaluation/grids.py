"""The grid pointing game for several models, see `metrics.grid`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipelines.attribution import Attribution, attribute
from pipelines.bcos import add_inverse
from pipelines.distributed import Context
from pipelines.evaluation.batches import examples_by_key
from pipelines.evaluation.explained_model import ExplainedModel, knows_positions
from pipelines.evaluation.predictions import Predictions
from pipelines.metrics import (
    Grid,
    LocalisationMetric,
    confidence,
    draw_grids,
    eligible,
    grid_batches,
    grid_pointing_game,
    in_windows,
    measured,
)
from pipelines.params import EvaluateParams


def play_grid_pointing_game(
    context: Context,
    models: Mapping[str, ExplainedModel],
    predictions: Predictions,
    batches: Any,
    params: EvaluateParams,
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, float]]]]:
    """Plays the game; returns side and number of the grids, and model -> explanation -> score -> mean.

    `gridpg` is measured on the same grids for all models, whose images all models classify correctly with
    sigmoid(logit) > 0.5. `gridpg_own_grids` is measured on each model's own grids, as published. A score
    without grids is absent.
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

    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, explained in models.items():
        scores[name] = {explanation: {} for explanation in explained.explanations}
        for explanation, attribution in explained.explanations.items():
            explain_many = grid_explainer(explained, attribution)
            for key, grids in zip(("gridpg", "gridpg_own_grids"), played[name], strict=True):
                metric = LocalisationMetric().to(context.device)
                for tiled, classes in grid_batches(_share(context, grids), images, params.grid_batch):
                    metric.update(grid_pointing_game(explain_many, tiled, classes, params.smooth).flatten())
                if grids:
                    scores[name][explanation] |= measured({key: metric.compute()["mean"]})
    correct = eligible(predictions.labels, *predictions.logits.values())
    return {"side": params.grid_size, "count": len(common), "eligible_images": int(correct.sum())}, scores


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
