"""COCO's segmentations, polygons or run lengths, as masks whose instance i is the box i - 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data.formats.png import encode_png
from pipelines.data.shards.sample import DataError

_LEAST_NUMBERS = 6  # of a polygon: three corners. pycocotools takes four numbers for a box.
_FARTHEST = 10  # sides of the image that a polygon may reach to: pycocotools draws whatever it is given, pixel by pixel


def encode(segmentation: Any, height: int, width: int, where: str) -> str | None:
    """The compressed run lengths of a segmentation; None if it is empty or no polygon has three corners.

    Raises:
        DataError: the segmentation is neither polygons nor run lengths of height x width pixels; the error names `where`.
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
        if not all(
            abs(number) <= _FARTHEST * max(height, width) for polygon in corners for number in polygon
        ):  # NaN, too
            raise ValueError("a corner far outside")
        merged = mask.merge(mask.frPyObjects(corners, height, width))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: segmentation is neither polygons nor run lengths of {width} x {height} ({error})"
        ) from None
    return str(merged["counts"].decode("ascii"))


def _run_lengths(segmentation: dict[str, Any], height: int, width: int) -> str:
    """Compressed run lengths of plain or compressed ones; raises `ValueError` unless they fill the image."""
    from pycocotools import mask

    counts = segmentation["counts"]
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"size {segmentation['size']}")
    runs = _decompressed(counts) if isinstance(counts, str) else list(counts)
    if (
        min(runs, default=0) < 0 or sum(runs) != height * width
    ):  # pycocotools leaves pixels as they come, where they are less
        raise ValueError(f"runs of {sum(runs)} pixels")
    encoded = mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return str(encoded["counts"].decode("ascii"))


def _decompressed(counts: str) -> list[int]:
    """The runs in a compressed string.

    A character holds five bits, the lowest first, the last one with a sign. From the third run on, the difference to the last
    but one is stored.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:  # more follows
            continue
        if bits & 0x10:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs


def draw(shapes: Sequence[str], height: int, width: int) -> bytes:
    """The PNG of instance ids of run lengths: i for `shapes[i - 1]`, the smallest shape on top."""
    from pycocotools import mask

    decoded = [
        mask.decode({"size": [height, width], "counts": counts.encode("ascii")}).astype(bool)
        for counts in shapes
    ]
    ids = np.zeros((height, width), np.uint8 if len(shapes) <= np.iinfo(np.uint8).max else np.uint16)
    for number in sorted(range(len(shapes)), key=lambda number: -int(decoded[number].sum())):
        ids[decoded[number]] = number + 1
    return encode_png(ids, deflate=True)
