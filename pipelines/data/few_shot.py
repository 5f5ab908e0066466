"""A few training images of each class, drawn by a seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pipelines.data.manifest import read_manifest
from pipelines.data.reader import read_samples
from pipelines.data.sample import DataError


@dataclass(frozen=True)
class Subset:
    """A draw of `few_shot`: the samples' numbers, counted through the split's shards, in ascending order, and their keys."""

    split: str
    shots: int
    seed: int
    numbers: tuple[int, ...]
    keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What a report says of it."""
        drawn = {"split": self.split, "shots": self.shots, "seed": self.seed}
        return {**drawn, "count": len(self.keys), "keys": list(self.keys)}


def few_shot(root: str, split: str, shots: int, seed: int) -> Subset:
    """`shots` images of each class of a split.

    Samples are ranked by a hash of `seed` and key, so that the draw depends on nothing else, and fewer shots of a seed are among
    its more. Where images have several labels, the first `shots` of each class are taken: a class may get more with others.

    Args:
        root: shards: a folder or any fsspec URL.
        split: its name in the manifest.
        shots: images a class.
        seed: of the draw.

    Raises:
        DataError: a class has fewer images, or the data has no labels.
    """
    manifest = read_manifest(root)
    if not manifest.labelled:
        raise DataError("shots: images without labels cannot be drawn class by class")
    members: list[list[tuple[bytes, int, str]]] = [[] for _ in manifest.classes]
    numbers = range(manifest.count(split))
    for number, raw in enumerate(read_samples(root, manifest.shards(split), numbers, verify=False)):
        known = json.loads(raw.files["json"])
        rank = hashlib.sha256(f"{seed}/{raw.key}".encode()).digest()
        for label in known["labels"] if manifest.task == "multilabel" else [known["label"]]:
            members[label].append((rank, number, raw.key))
    chosen: dict[int, str] = {}
    for name, of_class in zip(manifest.classes, members, strict=True):
        if len(of_class) < shots:
            raise DataError(f"shots: {shots} images a class are asked for; class {name!r} has {len(of_class)} in {split}")
        chosen |= {number: key for _, number, key in sorted(of_class)[:shots]}
    return Subset(split, shots, seed, tuple(sorted(chosen)), tuple(chosen[number] for number in sorted(chosen)))
