"""Text localisation: explanations of image-text cosines, scored on the boxes of what the texts name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import Manifest, read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.explained_model import ExplainedModel, with_explanations
from pipelines.evaluation.figures import explanation_figures, pointing_figures
from pipelines.evaluation.scores import score_explanations
from pipelines.evaluation.tables import joined
from pipelines.evaluation.towers import as_classifier, class_names, load_towers, zero_shot_networks
from pipelines.evidence import OF_EXPLANATIONS
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
        `explanation_figures` (`epg`, `size_corrected_epg`, `on_object_epg` if there are masks, ...) and of
        `pointing_figures`.

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
    tables, images = [], 0
    mine = loader(shards, split, data, batch_size, context=context, fields=("boxes", "mask"))
    for batch in mine:
        batch = to_device(batch, context.device)
        images += len(batch["key"])
        for name, each in explained.items():
            tables.append(score_explanations(each, batch, between_classes=True)[1].assign(model=name))
    rows = joined(tables, context, OF_EXPLANATIONS)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in explained}
    for (model, explanation), of in rows.groupby(["model", "explanation"]) if len(rows) else ():
        found[model][explanation] = explanation_figures(of) | pointing_figures(of)
    return {
        "models": found,
        "images": sum(gather(images, context)),
        "skipped": sum(gather(mine.skipped, context)),
    }
