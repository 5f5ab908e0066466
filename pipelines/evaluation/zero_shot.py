"""Zero-shot classification by image towers; texts describe the classes. N images, K classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipelines.bcos import add_inverse
from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import Manifest, read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.towers import class_names, load_towers, zero_shot_networks
from pipelines.metrics import measured, multiclass_metrics
from pipelines.params import ClipEvaluateParams, DataParams


@exact_float32()
def evaluate_zero_shot(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: ClipEvaluateParams,
    split: str = "test",
    texts: Mapping[str, str] | None = None,
    cache: str | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy of image towers on `split`, all on the same images; the same on every worker.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of each image tower.
        shards: root of the labelled data.
        data: how shards are read.
        params: names of the classes, templates of the texts, and the scale of the logits.
        split: the split to classify.
        texts: name of a tower -> folder of its text tower; by default the tower's own folder.
        cache: folder for embeddings of the texts.

    Returns:
        `{"models": {name: {"accuracy", "accuracy_top5", "calibration_error"}}, "classes": K, "images": N,
        "skipped": n}`, fractions in [0, 1]; `accuracy_top5` for 6 classes or more.

    Raises:
        DataError: images without a label or with several, or more or fewer names than classes of the data.
        ModelError: a folder without image tower or text tower, towers of different widths, or bad names or
            templates.
    """
    manifest = check_labels(shards)
    names = class_names(params.names, manifest)
    networks = zero_shot_networks(
        load_towers(directories, texts or {}, context.device), names, params.templates, params, cache
    )
    return classify(context, networks, len(names), shards, data, params.batch_size, split)


def check_labels(shards: str) -> Manifest:
    """Returns the manifest of the shards; raises `DataError` unless each image has one label."""
    manifest = read_manifest(shards)
    if manifest.task != "multiclass":
        told = "several labels" if manifest.task == "multilabel" else "no label"
        raise DataError(f"{shards}: its images have {told}: accuracy needs one label for each image")
    return manifest


@torch.no_grad()
def classify(
    context: Context,
    classifiers: Mapping[str, nn.Module],
    classes: int,
    shards: str,
    data: DataParams,
    batch_size: int,
    split: str,
) -> dict[str, Any]:
    """Result of `evaluate_zero_shot` for `classifiers` (N, 6, H, W) -> logits (N, K)."""
    metrics = {name: multiclass_metrics(classes).to(context.device) for name in classifiers}
    images = 0
    mine = loader(shards, split, data, batch_size, context=context, fields=())
    for batch in mine:
        batch = to_device(batch, context.device)
        six_channels = add_inverse(batch["image"])
        images += len(batch["key"])
        for name, model in classifiers.items():
            metrics[name].update(model(six_channels), batch["label"])
    found = {name: measured(metric.compute()) for name, metric in metrics.items()}
    counts = {"images": sum(gather(images, context)), "skipped": sum(gather(mine.skipped, context))}
    return {"models": found, "classes": classes, **counts}
