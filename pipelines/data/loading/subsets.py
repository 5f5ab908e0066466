"""Seeded subsets of the training images: some per class (few-shot), or a share whose boxes are used.

Also the keys of the validation images. Everything comes from the index beside the shards, not from shards.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from pipelines.data.shards.index import read_index
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subset:
    """Samples drawn by `few_shot`: numbers through the split's shards, ascending, and keys in this order."""

    split: str
    shots: int
    seed: int
    numbers: tuple[int, ...]
    keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The draw as reports show it."""
        drawn = {"split": self.split, "shots": self.shots, "seed": self.seed}
        return {**drawn, "count": len(self.keys), "keys": list(self.keys)}


def few_shot(root: str, split: str, shots: int, seed: int) -> Subset:
    """Draws `shots` images per class of a split.

    Within a class, images are ranked by a hash of `seed` and key, and the first `shots` are taken. The draw
    depends on nothing else, and a larger draw by the same seed contains the smaller ones. If images have
    several labels, a class may get more images through other classes. A class with fewer images gives all of
    them, and the number of such classes is logged.

    Args:
        root: folder or fsspec URL of the shards.
        split: name of the split in the manifest.
        shots: images per class.
        seed: seed of the draw.

    Raises:
        DataError: the data has no labels, no image of the split has one, or the shards have no index.
    """
    manifest = read_manifest(root)
    if not manifest.labelled:
        raise DataError("shots: images without labels cannot be drawn class by class")
    members: list[list[tuple[bytes, int, str]]] = [[] for _ in manifest.classes]
    for number, (key, known) in enumerate(_indexed(root, split)):
        for label in known["labels"] if manifest.task == "multilabel" else [known["label"]]:
            members[label].append((_rank(seed, key), number, key))
    chosen: dict[int, str] = {}
    for of_class in members:
        chosen |= {number: key for _, number, key in sorted(of_class)[:shots]}
    if not chosen:
        raise DataError(f"shots: no image of {split} has a class")
    fewer = [
        (len(of_class), name)
        for name, of_class in zip(manifest.classes, members, strict=True)
        if len(of_class) < shots
    ]
    if fewer:
        count, name = min(fewer)
        told = (shots, len(fewer), len(members), split, name, count)
        log.warning(
            "shots: %d images a class; %d of %d classes have fewer in %s and give all (%r has %d)", *told
        )
    return Subset(
        split, shots, seed, tuple(sorted(chosen)), tuple(chosen[number] for number in sorted(chosen))
    )


def validation_images(root: str, split: str = "val") -> dict[str, Any]:
    """Number and keys of the images on which models are selected, for reports; `root` as in `few_shot`."""
    keys = [key for key, _ in _indexed(root, split)]
    return {"split": split, "count": len(keys), "keys": keys}


def annotated_images(root: str, split: str, share: float, seed: int) -> tuple[str, ...]:
    """Draws the `share` of the images whose boxes are used; returns their keys, sorted.

    The draw is stratified. For each class, from the rarest to the most frequent, it takes `share` of the
    images with a box of the class, rounded up. Images that were drawn for earlier classes count. Within a
    class, images are ranked by a hash of `seed` and key.

    Args:
        root: folder or fsspec URL of the shards.
        split: name of the split in the manifest.
        share: in (0, 1].
        seed: seed of the draw.

    Raises:
        DataError: no image of the split has a box, or the shards have no index.
    """
    members: dict[int, list[str]] = {}
    for key, known in _indexed(root, split):
        for label in known.get("box_classes", ()):
            members.setdefault(label, []).append(key)
    if not members:
        raise DataError(f"{root}: no image of {split} has a box: guidance needs some")
    chosen: set[str] = set()
    for _, keys in sorted(members.items(), key=lambda item: (len(item[1]), item[0])):
        left = sorted((key for key in keys if key not in chosen), key=lambda key: _rank(seed, key))
        wanted = ceil(share * len(keys)) - (len(keys) - len(left))
        chosen.update(left[: max(0, wanted)])
    return tuple(sorted(chosen))


def _indexed(root: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields key and index line of each sample, in the order of the shards."""
    return ((line["key"], line) for line in read_index(root, read_manifest(root), split))


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
