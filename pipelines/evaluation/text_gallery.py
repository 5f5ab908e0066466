"""Pictures that explain the cosines of an image with texts. T texts, D dimensions, H x W pixels."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.bcos import add_inverse, contribution_map, dynamic_weights, rgba
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.evaluation.batches import present
from pipelines.evaluation.pictures import save_texts
from pipelines.evaluation.towers import class_names, load_towers
from pipelines.models.zero_shot import ZeroShotNetwork, zero_shot_weights
from pipelines.params import ClipEvaluateParams, DataParams


def explain_texts(
    tower: nn.Module, images: Tensor, texts: Tensor, hold_norm: bool = True
) -> tuple[Tensor, Tensor]:
    """Cosines of an image with texts, and their dynamic weights W(x), from one forward pass of the tower.

    Args:
        tower: a B-cosified image tower.
        images: (1, 6, H, W) in [0, 1].
        texts: embeddings (T, D).
        hold_norm: hold the norm of the image's embedding. If False, it is differentiated, as published.

    Returns:
        Cosines (T,) and weights (T, 6, H, W). With the norm held and without biases, the cosine equals
        Σ weights·(images - mean).
    """
    network = ZeroShotNetwork(tower, texts, hold_norm=hold_norm).eval()
    cosines_NT, weights_NTCHW = dynamic_weights(
        network, images, torch.arange(len(texts), device=images.device)[None]
    )
    return cosines_NT[0], weights_NTCHW[0]


def draw_text_gallery(
    folder: Path,
    directories: Mapping[str, str | Path],
    shards: str,
    data: DataParams,
    params: ClipEvaluateParams,
    split: str = "test",
) -> list[Path]:
    """Writes `params.pictures` pictures per tower to `folder`; returns their paths.

    Each picture explains one image for the classes in it and for one other class.

    Args:
        folder: folder of the pictures; created if missing.
        directories: name -> folder of each B-cosified image tower with its text tower.
        shards, data, params, split: as in `evaluate_text_localisation`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(shards)
    names, draw = class_names(params.localisation_names, manifest), random.Random(params.seed)
    count = manifest.count(split)
    numbers = sorted(draw.sample(range(count), min(params.pictures, count)))
    if not numbers:
        return []
    (batch,) = loader(shards, split, data, len(numbers), subset=numbers, fields=())
    in_image, images = present(batch, len(names)), add_inverse(batch["image"])
    paths = []
    for name, tower in load_towers(
        {key: str(path) for key, path in directories.items()}, {}, torch.device("cpu")
    ).items():
        texts = zero_shot_weights(
            tower.text, names, params.localisation_templates, batch_size=params.text_batch
        )
        for row, key in enumerate(batch["key"]):
            shown = in_image[row].nonzero()[:, 0].tolist()
            shown += (
                [next((other for other in range(len(names)) if other not in shown), shown[0])]
                if shown
                else [0]
            )
            image = images[row : row + 1]
            cosines, weights = explain_texts(tower.model, image, texts[shown], params.hold_norm)
            repeated = image.expand(len(shown), -1, -1, -1)
            titles = [
                f"{names[label]}\ncosine {cosine:.3f}"
                for label, cosine in zip(shown, cosines.tolist(), strict=True)
            ]
            paths.append(folder / f"{name}-{key}.png")
            colours = rgba(repeated, weights, params.smooth, one_scale=True)
            save_texts(paths[-1], image[0], titles, colours, contribution_map(repeated, weights))
    return paths
