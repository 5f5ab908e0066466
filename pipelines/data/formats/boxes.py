"""Annotations of images, and a check of their boxes: kept, clipped, dropped or refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.data.formats.left_out import LeftOut
from pipelines.data.shards.sample import Box, DataError

OVERHANG = 1.0  # pixels by which a box may exceed the image and is clipped, because annotation tools round
LEAST = 1.0  # pixels that each side must have at least

Corners = tuple[float, float, float, float]
Fault = Literal["inverted", "outside", "empty"]

_DESCRIBED: dict[Fault, str] = {
    "inverted": "is inverted: xmin <= xmax and ymin <= ymax are needed",
    "outside": "is outside its image of {width} x {height} pixels",
    "empty": "is empty: each side must have a pixel",
}


@dataclass(frozen=True)
class Annotation:
    """The annotation of one image: size, labels and boxes.

    `mask` is a JSON value from which the source draws the instance mask; see `AnnotatedImages.draw_mask`.
    """

    width: int  # stored pixels
    height: int
    boxes: tuple[Box, ...] = ()
    label: int | None = None
    labels: tuple[int, ...] | None = None
    group: int | None = None
    mask: Any = None


class BoxCheck:
    """Checks boxes against their images: clips a small overhang, and drops or refuses faulty boxes.

    Args:
        on_bad_box: for a faulty box, `raise` an error or `skip` the box. Its class stays a label of the
            image.
        left_out: counts the dropped boxes by fault.
        expected: known faults of the data set; boxes with one of these are always dropped.

    Attributes:
        left_out: as given.
        clipped: number of boxes that were clipped so far, by at most `OVERHANG` pixels per side.
    """

    def __init__(
        self, on_bad_box: Literal["raise", "skip"], left_out: LeftOut, expected: Collection[str] = ()
    ) -> None:
        self._skipped = {"inverted", "outside", "empty"} if on_bad_box == "skip" else set(expected)
        self.left_out = left_out
        self.clipped = 0

    def __call__(self, corners: Sequence[float], width: int, height: int, where: str) -> Corners | None:
        """The half-open corners, clipped to the image of width x height pixels; `None` if the box is dropped.

        Raises:
            DataError: the box has a fault that is not skipped, or a number that is not finite. The error
                names `where`.
        """
        if not all(math.isfinite(value) for value in corners):
            raise DataError(f"{where}: box {list(corners)} has a number that is not finite")
        xmin, ymin, xmax, ymax = corners
        clipped = (max(xmin, 0.0), max(ymin, 0.0), min(xmax, float(width)), min(ymax, float(height)))
        fault = _fault(corners, clipped)
        if fault is None:
            self.clipped += clipped != tuple(corners)
            return clipped
        if fault not in self._skipped:
            told = _DESCRIBED[fault].format(width=width, height=height)
            raise DataError(
                f"{where}: box {list(corners)} {told}; correct it, or set on_bad_box: skip to leave it out"
            )
        self.left_out.add(f"{fault} boxes", where)
        return None


def _fault(corners: Sequence[float], clipped: Corners) -> Fault | None:
    xmin, ymin, xmax, ymax = corners
    if xmax < xmin or ymax < ymin:
        return "inverted"
    if max(abs(given - inside) for given, inside in zip(corners, clipped, strict=True)) > OVERHANG:
        return "outside"
    if clipped[2] - clipped[0] < LEAST or clipped[3] - clipped[1] < LEAST:
        return "empty"
    return None
