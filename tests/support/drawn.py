"""Shards of drawn scenes, and small models that overfit to them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.data import sources
from pipelines.data.drawing.scene import CLASSES
from pipelines.data.loading.loader import loader
from pipelines.data.shards.writer import write_shards
from pipelines.distributed import Context
from pipelines.models import ModelSpec
from pipelines.params import DataParams, ScenesParams


def drawn_shards(folder: Path, shard_size: int, **params: Any) -> str:
    """Writes shards of scenes and returns their root; `params` are those of `ScenesParams`."""
    source = sources.get(ScenesParams(source="scenes", **params))
    source.fetch(folder / "raw", folder / "cache", progress=False)
    write_shards(source, folder / "raw", str(folder / "shards"), shard_size=shard_size, progress=False)
    return str(folder / "shards")


def known_by_heart(folder: Path, shards: str, data: DataParams, device: str = "cpu") -> dict[str, str]:
    """Trains a `conventional` and a `bcos` model to fit the 50 test images; returns their folders.

    Grids need images that are classified correctly with confidence.
    """
    (batch,) = loader(shards, "test", data, 50, context=Context(device=torch.device(device)))
    images, wanted = (
        add_inverse(batch["image"]),
        nn.functional.one_hot(batch["label"], len(CLASSES)).float().to(device),
    )
    for kind in ("conventional", "bcos"):
        torch.manual_seed(0)
        spec = ModelSpec("resnet8", CLASSES, data.image_size, kind)  # type: ignore[arg-type]
        model = models.assemble(spec).train().to(device)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(images), wanted).backward()
            optimiser.step()
        models.save(folder / kind, model, spec)
    return {kind: str(folder / kind) for kind in ("conventional", "bcos")}


def untrained_on_scenes(folder: Path, data: DataParams) -> tuple[dict[str, str], str]:
    """Draws scenes of 1 to 3 objects; returns an untrained multi-label model `bcos`, and their shards."""
    drawn = {"variant": "scenes", "objects_per_image": (1, 3), "counts": {"train": 4, "val": 4, "test": 12}}
    shards = drawn_shards(folder, 20, image_size=data.image_size, **drawn)
    spec = ModelSpec("resnet8", CLASSES, data.image_size, "bcos", task="multilabel")
    models.save(folder / "model", models.assemble(spec), spec)
    return {"bcos": str(folder / "model")}, shards


def flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields pairs of a path (a/b/c) and a value from nested dicts."""
    for key, value in found.items():
        yield from flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]
