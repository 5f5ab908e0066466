"""COCO's segmentations (polygons or run lengths) as masks of instance ids: id i is `boxes[i - 1]`.

A run-length encoding lists the lengths of alternating runs of 0 and 1, in column-major order of the H x W
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data.formats.png import encode_png
from pipelines.data.shards.sample import DataError

_LEAST_NUMBERS = 6  # in a polygon: x, y of three corners. pycocotools would take four numbers for a box.
# Largest coordinate in multiples of the image's larger side. pycocotools draws each edge pixel by pixel, so a
# huge coordinate would take too long.
_FARTHEST = 10


def encode(segmentation: Any, height: int, width: int, where: str) -> str | None:
    """The compressed run lengths of a segmentation; `None` if it is empty or no polygon has three corners.

    Raises:
        DataError: the segmentation is neither polygons nor run lengths of height x width pixels. The error
            names `where`.
    """
    from pycocotools import mask

    try:
        if isinstance(segmentation, dict):
            return _run_lengths(segmentation, height, width)
        polygons = [
            polygon
            for polygon in segmentation or ()
            if len(polygon) >= _LEAST_NUMBERS and len(polygon) % 2 == 0
        ]
        if not polygons:
            return None
        corners = [[float(number) for number in polygon] for polygon in polygons]
        # False for NaN, too
        if not all(
            abs(number) <= _FARTHEST * max(height, width) for polygon in corners for number in polygon
        ):
            raise ValueError("a corner far outside")
        merged = mask.merge(mask.frPyObjects(corners, height, width))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: segmentation is neither polygons nor run lengths of {width} x {height} ({error})"
        ) from None
    return str(merged["counts"].decode("ascii"))


def _run_lengths(segmentation: dict[str, Any], height: int, width: int) -> str:
    """Plain or compressed run lengths in compressed form; raises `ValueError` unless they fill the image."""
    from pycocotools import mask

    counts = segmentation["counts"]
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"size {segmentation['size']}")
    runs = _decompressed(counts) if isinstance(counts, str) else list(counts)
    # If the runs were shorter than the image, pycocotools would leave the remaining pixels uninitialised.
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"runs of {sum(runs)} pixels")
    encoded = mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return str(encoded["counts"].decode("ascii"))


def _decompressed(counts: str) -> list[int]:
    """The run lengths that COCO's compressed string `counts` encodes.

    Each character has 48 added, and holds five bits of a number, lowest bits first. Bit 0x20 says that more
    characters of the number follow; bit 0x10 of its last character is the sign. From the fourth run on, the
    number is the difference to the run two before.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs


def draw(shapes: Sequence[str], height: int, width: int) -> bytes:
    """The PNG of instance ids (H, W): i where `shapes[i - 1]` lies, smaller shapes over larger ones."""
    from pycocotools import mask

    decoded = [
        mask.decode({"size": [height, width], "counts": counts.encode("ascii")}).astype(bool)
        for counts in shapes
    ]
    ids = np.zeros((height, width), np.uint8 if len(shapes) <= np.iinfo(np.uint8).max else np.uint16)
    for number in sorted(range(len(shapes)), key=lambda number: -int(decoded[number].sum())):
        ids[decoded[number]] = number + 1
    return encode_png(ids, deflate=True)
