"""A small source in memory, for tests of shards and loader: distinct noise images of 8 x 8 pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.shards.sample import Description, Sample

CLASSES = ("circle", "square", "star")
SIDE = 8


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Returns `pixels` as an encoded image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(number: int, **changes: Any) -> Sample:
    """Returns a sample with only a label."""
    return Sample(
        **{
            "key": f"k{number:04d}",
            "image": encoded(noise(number)),
            "extension": "png",
            "label": number % 3,
            **changes,
        }
    )


def rich(number: int, **changes: Any) -> Sample:
    """Returns a sample with two boxes, a mask that fills them, group and caption; each third has none."""
    if number % 3 == 2:
        return plain(number, **changes)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[1:4, 0:3] = 1
    mask[5:8, 4:8] = 2
    boxes = ((0, 0.0, 1.0, 3.0, 4.0), (2, 4.0, 5.0, 8.0, 8.0))
    known = {"boxes": boxes, "mask": encoded(mask), "group": number % 2, "captions": (f"picture {number}",)}
    return plain(number, **{**known, **changes})


@dataclass(frozen=True)
class ToySource:
    """Samples given as lists by split. Picklable, as sources are."""

    samples: dict[str, list[Sample]]
    task: str = "multiclass"

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Nothing to fetch."""

    def describe(self, raw: Path) -> Description:
        counts = {split: len(samples) for split, samples in self.samples.items()}
        return Description(CLASSES, self.task, "toy", "0" * 64, counts)  # type: ignore[arg-type]

    def index(self, raw: Path, split: str) -> list[tuple[str, int]]:
        """Returns the split and position of each sample."""
        return [(split, number) for number in range(len(self.samples[split]))]

    def load(self, raw: Path, reference: tuple[str, int]) -> Sample:
        split, number = reference
        return self.samples[split][number]
