"""Text localisation: explanations of image-text cosines, scored on the boxes of what the texts name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import Manifest, read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.explained_model import ExplainedModel, with_explanations
from pipelines.evaluation.scores import Scores
from pipelines.evaluation.towers import as_classifier, class_names, load_towers, zero_shot_networks
from pipelines.metrics import area_share, energy_pointing_game
from pipelines.params import ClipEvaluateParams, DataParams


@exact_float32()
def evaluate_text_localisation(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: ClipEvaluateParams,
    split: str = "test",
    texts: Mapping[str, str] | None = None,
    cache: str | None = None,
) -> dict[str, Any]:
    """Localisation of the texts' explanations, over the classes in each image; the same on every worker.

    A B-cos tower explains the cosine by W(x), a conventional tower by the methods of `params.posthoc`.
    GradCAM is left out, with a printed note, if a tower has no convolutional features.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of each image tower.
        shards: root of labelled data with boxes and optional masks.
        data: how shards are read.
        params: `localisation_names` and `localisation_templates` make the texts.
        split: the split to explain.
        texts: name of a tower -> folder of its text tower; by default the tower's own folder.
        cache: folder for embeddings of the texts.

    Returns:
        `{"models": {name: {explanation: scores}}, "images": N, "skipped": n}` with the scores of
        `Scores.compute` (`epg`, `size_corrected_epg`, `on_object_epg` if there are masks, ...) and of
        `TextScores`.

    Raises:
        DataError: data without labels or boxes, or names that are not as many as the classes of the data.
        ModelError: a folder without image tower or text tower, towers of different widths, or bad names or
            templates.
    """
    manifest = check_located(shards, split)
    names = class_names(params.localisation_names, manifest)
    towers = load_towers(directories, texts or {}, context.device)
    networks = zero_shot_networks(towers, names, params.localisation_templates, params, cache)
    explained = {
        name: with_explanations(name, network, as_classifier(towers[name].spec, names), params.posthoc)
        for name, network in networks.items()
    }
    return localise(context, explained, shards, data, params.batch_size, split)


def check_located(shards: str, split: str) -> Manifest:
    """Returns the manifest; raises `DataError` unless images of `split` have labels and boxes."""
    manifest = read_manifest(shards)
    if not manifest.labelled:
        raise DataError(
            f"{shards}: images without labels: text localisation needs to know what is in an image"
        )
    if "boxes" not in manifest.fields.get(split, ()):
        raise DataError(f"{shards}: no image of {split} has a box: text localisation needs some")
    return manifest


def localise(
    context: Context,
    explained: Mapping[str, ExplainedModel],
    shards: str,
    data: DataParams,
    batch_size: int,
    split: str,
) -> dict[str, Any]:
    """Result of `evaluate_text_localisation` for zero-shot classifiers of the data's classes."""
    scores = {name: TextScores(model, context.device) for name, model in explained.items()}
    images = 0
    mine = loader(shards, split, data, batch_size, context=context, fields=("boxes", "mask"))
    for batch in mine:
        batch = to_device(batch, context.device)
        images += len(batch["key"])
        for each in scores.values():
            each.update(batch)
    found = {name: each.compute(context, thresholds={}) for name, each in scores.items()}
    return {
        "models": found,
        "images": sum(gather(images, context)),
        "skipped": sum(gather(mine.skipped, context)),
    }


class TextScores(Scores):
    """`Scores` of a zero-shot classifier's explanations, with two additional scores.

    - `box_share`: mean share of the image that the boxes cover, which is the EPG of a uniform map.
    - `points_to_own`: share of the ordered pairs (A, B) of classes in one image for which A's map has a
      larger part of its energy on A than B's map has. "On A" means inside the boxes of A and outside the
      boxes of B; pairs without such pixels are left out. Maps that do not depend on the text score 0, random
      maps score `points_to_own_chance`.
    """

    def _add_boxes(self, name: str, maps: Tensor, masks: Tensor, boxed: Tensor) -> None:
        super()._add_boxes(name, maps, masks, boxed)
        shares = area_share(masks)
        self._add(
            name, "box_share", shares[shares > 0], torch.zeros_like(shares[shares > 0], dtype=torch.bool)
        )

    def _add_between_classes(self, name: str, maps: Tensor, masks: Tensor, rows: Tensor) -> None:
        rows, located = rows.to(maps.device), masks.flatten(1).any(1)
        together = (
            (rows[:, None] == rows)
            & located[:, None]
            & located
            & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        )
        one, other = together.nonzero(as_tuple=True)
        own = masks[one] & ~masks[other]
        apart = own.flatten(1).any(1)
        one, other, own = one[apart], other[apart], own[apart]
        if len(one):
            more = energy_pointing_game(maps[one], own) > energy_pointing_game(maps[other], own)
            self._add(name, "points_to_own", more.double(), torch.zeros_like(more))

    @staticmethod
    def _figures(key: str, value: Any, threshold: int | None) -> dict[str, float]:
        found = Scores._figures(key, value, threshold)
        if key == "points_to_own":
            found |= {"points_to_own_pairs": int(value["count"]), "points_to_own_chance": 0.5}
        return {
            each: figure
            for each, figure in found.items()
            if each not in ("box_share_undefined", "points_to_own_undefined")
        }
