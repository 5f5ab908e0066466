"""Batches of an evaluation pass, and examples picked from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.data.loading.batch import Batch


def labels_of(batch: Batch) -> Tensor:
    """Labels (N,), or multi-hot (N, K), as int64."""
    return batch["label"] if "label" in batch else batch["labels"].long()


def present(batch: Batch, classes: int) -> Tensor:
    """Which classes are in each image: (N, K) of bool."""
    return F.one_hot(batch["label"], classes).bool() if "label" in batch else batch["labels"].bool()


@dataclass(frozen=True)
class Example:
    """An image of the split, as bytes: many of them are held at once."""

    image: Tensor  # uint8 (3, H, W)
    classes: list[int]
    boxes: Tensor  # (n, 5): class, xmin, ymin, xmax, ymax


def examples_by_key(batches: Iterable[Batch], wanted: set[str]) -> dict[str, Example]:
    """The examples of the keys that are wanted, from one pass."""
    found: dict[str, Example] = {}
    for batch in batches if wanted else ():
        boxes = batch.get("boxes", [torch.zeros(0, 5)] * len(batch["key"]))
        for key, image, labels, of_image in zip(batch["key"], batch["image"], labels_of(batch), boxes, strict=True):
            if key in wanted:
                classes = labels.nonzero()[:, 0].tolist() if labels.ndim else [int(labels)]
                found[key] = Example((image * 255).round().byte(), classes, of_image)
    return found
