"""What an annotation file says of one image, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.data.shards.sample import Box


@dataclass(frozen=True)
class Annotation:
    """Size, labels and boxes of one image; the source draws the mask from the JSON value `mask`."""

    width: int  # stored pixels
    height: int
    boxes: tuple[Box, ...] = ()
    label: int | None = None
    labels: tuple[int, ...] | None = None
    group: int | None = None
    mask: Any = None
