"""Labels of a batch, and examples picked by key. N images, K classes, n boxes, H x W pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.data.loading.batch import Batch


def labels_of(batch: Batch) -> Tensor:
    """Labels of a batch as int64: (N,), or multi-hot (N, K)."""
    return batch["label"] if "label" in batch else batch["labels"].long()


def present(batch: Batch, classes: int) -> Tensor:
    """(N, K) of bool, True for the classes in each image."""
    return F.one_hot(batch["label"], classes).bool() if "label" in batch else batch["labels"].bool()


@dataclass(frozen=True)
class Example:
    """An image of a split, picked by its key."""

    image: Tensor  # (3, H, W), uint8 to save memory
    classes: list[int]
    boxes: Tensor  # (n, 4): xmin, ymin, xmax, ymax, in pixels, half-open


def examples_by_key(read: Callable[..., Iterable[Batch]], wanted: set[str]) -> dict[str, Example]:
    """Key -> example for the keys in `wanted`, from one pass over the split.

    `read` is `loader` with the shards, split, params and batch size bound.
    """
    found: dict[str, Example] = {}
    for batch in read(as_bytes=True, fields=("boxes",)) if wanted else ():
        boxes = batch.get("boxes", torch.zeros(0, 6))
        for row, (key, image, labels) in enumerate(
            zip(batch["key"], batch["image"], labels_of(batch), strict=True)
        ):
            if key in wanted:
                classes = labels.nonzero()[:, 0].tolist() if labels.ndim else [int(labels)]
                found[key] = Example(image.clone(), classes, boxes[boxes[:, 0] == row, 2:])
    return found
