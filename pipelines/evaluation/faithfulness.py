"""Faithfulness of explanations on a sample of a split: deletion, insertion and single deletion per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipelines.attribution import Attribution, explain, explain_pairs
from pipelines.bcos import add_inverse
from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.distributed import Context, gather
from pipelines.evaluation.batches import present
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.evaluation.rows import Row, row, sampled
from pipelines.metrics import area_under, removal_curve, single_deletion
from pipelines.params import DataParams

KINDS = ("deletion", "insertion")
Curves = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True)
class Faithfulness:
    """Results of `evaluate_faithfulness`.

    Attributes:
        rows: one per image, class in the image, model and explanation (see `evaluation.rows`), sorted by key,
            with `deletion`, `insertion` (areas in [0, 1]) and `single_deletion` (in [-1, 1]).
        curves: model -> explanation -> `deletion` or `insertion` -> mean probability over the rows after each
            share of the pixels, steps + 1 values from no pixel removed to all.
    """

    rows: list[Row]
    curves: Curves


@exact_float32()
def evaluate_faithfulness(
    context: Context,
    models: Mapping[str, ExplainedModel],
    shards: str,
    data: DataParams,
    split: str = "test",
    *,
    count: int = 200,
    seed: int = 0,
    steps: int = 32,
    grid: int = 4,
    batch_size: int = 256,
) -> Faithfulness:
    """Removes pixels and patches from a sample of images; returns scores and mean curves, on every worker.

    Each model explains the classes that are in the image, so that all models are asked the same. Their logits
    become probabilities by a softmax over the classes if the task is multi-class, else by the sigmoid.

    Areas under deletion and insertion depend on how confident a model is, so they compare explanations of one
    model. `single_deletion` compares between models, too. As no model of this project was fine-tuned with
    patches removed, it is the published in-domain score only approximately (`metrics.single_deletion`).

    Args:
        context: rank and device of this worker.
        models: name -> model with its explanations.
        shards: root of the labelled data.
        data: how shards are read.
        split: split of which images are drawn.
        count: number of images; fewer if the split is smaller.
        seed: seed of the draw.
        steps: equal shares of the pixels that are removed one after the other.
        grid: patches per side for `single_deletion`.
        batch_size: images per forward pass.

    Raises:
        ValueError: `grid` does not divide the images' side.
    """
    subset = sampled(read_manifest(shards).count(split), count, seed)
    found: list[tuple[Row, Tensor]] = []
    for batch in loader(shards, split, data, batch_size, context=context, subset=subset, fields=()):
        images = add_inverse(batch["image"])
        for name, explained in models.items():
            in_image = present(batch, len(explained.spec.classes)).to(images.device)
            places, targets = in_image.nonzero(as_tuple=True)
            if not len(places):
                continue
            for explanation, attribution in explained.explanations.items():
                _, maps = explain_pairs(partial(_explain, explained, attribution), images, in_image)
                curves = _curves(explained, images[places], maps, targets, steps, batch_size)
                patches = single_deletion(
                    explained.model, images[places], maps, targets, grid=grid, batch_size=batch_size
                )
                for place, target, both, patch in zip(
                    places.tolist(), targets.tolist(), curves, patches.tolist(), strict=True
                ):
                    scores = dict(zip(KINDS, area_under(both).tolist(), strict=True)) | {
                        "single_deletion": patch
                    }
                    found.append((row(batch["key"][place], name, target, explanation, scores), both))
    found = sorted(
        (each for part in gather(found, context) for each in part), key=lambda each: each[0]["key"]
    )
    return Faithfulness([each for each, _ in found], _means(found))


def _explain(
    explained: ExplainedModel, attribution: Attribution, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    return explain(explained.model, images, targets, attribution)


def _curves(
    explained: ExplainedModel, images: Tensor, maps: Tensor, targets: Tensor, steps: int, batch_size: int
) -> Tensor:
    """Deletion and insertion curves of P pairs on the CPU: (P, 2, steps + 1), NaN for maps with NaN."""
    probability = partial(torch.softmax, dim=1) if explained.spec.task == "multiclass" else torch.sigmoid
    curve = partial(removal_curve, steps=steps, batch_size=batch_size, probability=probability)
    both = [curve(explained.model, images, order, targets) for order in (maps, -maps)]
    broken = maps.isnan().flatten(1).any(1)
    return torch.stack(both, dim=1).masked_fill(broken[:, None, None], torch.nan).cpu()


def _means(found: list[tuple[Row, Tensor]]) -> Curves:
    """Mean curves of each model and explanation over the rows whose map has no NaN."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for each, both in found:
        groups.setdefault((each["model"], each["explanation"]), []).append(both)
    means: Curves = {}
    for (model, explanation), of_rows in groups.items():
        mean = torch.stack(of_rows).double().nanmean(0)
        means.setdefault(model, {})[explanation] = dict(zip(KINDS, mean.tolist(), strict=True))
    return means
