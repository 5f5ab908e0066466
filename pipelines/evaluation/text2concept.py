"""Text2Concept: a linear map from the features of a B-cos classifier to the space of CLIP embeddings.

It is a baseline for B-cosified CLIP models. The map has no bias, so that the contributions of a bias-free
B-cos network still sum to the cosine. N images, C features, D dimensions of the embeddings.

Source: Moayeri et al., Text-To-Concept (and Back) via Cross-Model Alignment, ICML 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.explained_model import with_explanations
from pipelines.evaluation.text_localisation import localise
from pipelines.evaluation.towers import (
    Tower,
    as_classifier,
    check_width,
    class_names,
    load_features,
    load_image_tower,
    output_width,
    read_text_tower,
    replace_head,
    zero_shot_networks,
)
from pipelines.evaluation.zero_shot import classify
from pipelines.models import ModelError
from pipelines.params import ClipEvaluateParams, DataParams


@exact_float32()
def evaluate_text2concept(
    context: Context,
    directories: Mapping[str, str],
    original: str,
    shards: str,
    data: DataParams,
    params: ClipEvaluateParams,
    split: str = "test",
    text: str | None = None,
    train_split: str = "train",
    cache: str | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy and text localisation of B-cos classifiers that are mapped into CLIP's space.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of each B-cos classifier.
        original: folder of the original image tower.
        shards: root of the data.
        data: how shards are read.
        params: as in `evaluate_zero_shot` and `evaluate_text_localisation`.
        split: the split to classify and explain.
        text: folder of the text tower; by default `original`.
        train_split: the split on whose images the maps are fitted; labels are not used.
        cache: folder for embeddings of the texts.

    Returns:
        `{"alignment": {name: share}, "zero_shot": ..., "text_localisation": ...}`. `alignment` is the share
        that `fit_map` returns. The others are the results of `evaluate_zero_shot` (absent without single
        labels) and of `evaluate_text_localisation` (absent without boxes).

    Raises:
        DataError: the data has neither single labels nor boxes.
        ModelError: a model is not a B-cos classifier.
    """
    manifest = read_manifest(shards)
    classified = manifest.task == "multiclass"
    boxed = manifest.labelled and "boxes" in manifest.fields.get(split, ())
    if not classified and not boxed:
        raise DataError(
            f"{shards}: {split} has neither single labels nor boxes: "
            "there is nothing to evaluate Text2Concept on"
        )
    names, text_tower = (
        class_names(params.names, manifest),
        read_text_tower(text or original).to(context.device),
    )
    tower, tower_spec = load_image_tower(original, context.device)
    check_width(original, tower, tower_spec, text_tower)
    towers: dict[str, Tower] = {}
    alignment = {}
    for name, directory in directories.items():
        features, spec = load_features(directory, context.device)
        if spec.kind != "bcos" or spec.zero_shot or spec.task == "embedding":
            raise ModelError(f"{directory}: Text2Concept takes a B-cos classifier")
        width = output_width(features, spec)
        weight_CD, alignment[name] = fit_map(
            context,
            (features, width),
            (tower, text_tower.width),
            shards,
            data,
            params.batch_size,
            train_split,
        )
        towers[name] = Tower(with_map(directory, weight_CD), spec, text_tower)
    found: dict[str, Any] = {"alignment": alignment}
    if classified:
        networks = zero_shot_networks(towers, names, params.templates, params, cache)
        found["zero_shot"] = classify(context, networks, len(names), shards, data, params.batch_size, split)
    if boxed:
        networks = zero_shot_networks(towers, names, params.localisation_templates, params, cache)
        explained = {
            name: with_explanations(name, network, as_classifier(towers[name].spec, names), ())
            for name, network in networks.items()
        }
        found["text_localisation"] = localise(context, explained, shards, data, params.batch_size, split)
    return found


@torch.no_grad()
def fit_map(
    context: Context,
    features: tuple[nn.Module, int],
    tower: tuple[nn.Module, int],
    shards: str,
    data: DataParams,
    batch_size: int,
    split: str,
) -> tuple[Tensor, float]:
    """Fits a map (C, D) of features to normalised embeddings by least squares; returns it and its share.

    The share is 1 - Σ squared error / Σ squared norm of the embeddings; it is 1 for a perfect fit. Only the
    sums of the normal equations are kept, in float64, over all workers.

    Args:
        context: rank and device of this worker.
        features: a backbone (N, 6, H, W) -> (N, C), and C.
        tower: an image tower (N, 6, H, W) -> (N, D), and D.
        shards, data, batch_size, split: the images, as `loader` takes them.

    Raises:
        DataError: there is no image.
    """
    (backbone, width), (original, wanted) = features, tower
    sums = torch.zeros(width, width + wanted, dtype=torch.float64, device=context.device)
    count = 0
    for batch in loader(shards, split, data, batch_size, context=context, fields=()):
        images = add_inverse(to_device(batch, context.device)["image"])
        features_NC, embeddings_ND = backbone(images).double(), F.normalize(original(images).double(), dim=1)
        sums += features_NC.T @ torch.cat([features_NC, embeddings_ND], dim=1)
        count += len(images)
    if context.world_size > 1:
        dist.all_reduce(sums)
    count = sum(gather(count, context))
    if count == 0:
        raise DataError(f"{shards}: no image in {split}: Text2Concept cannot be fitted")
    gram_CC, products_CD = sums.split([width, wanted], dim=1)
    weight_CD = torch.linalg.pinv(gram_CC, hermitian=True) @ products_CD
    return weight_CD.float(), float((weight_CD * products_CD).sum() / count)


def with_map(directory: str, weight_CD: Tensor) -> nn.Module:
    """The classifier in `directory` with the map (C, D) as its head: (N, 6, H, W) -> (N, D), frozen."""
    model, _ = models.load(directory)
    width, wanted = weight_CD.shape
    head = nn.Linear(width, wanted, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight_CD.T)
    replace_head(model, head)
    return model.to(weight_CD.device).eval().requires_grad_(False)
