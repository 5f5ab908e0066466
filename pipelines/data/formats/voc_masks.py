"""PASCAL VOC's instance segmentations as masks whose instance i is the box i - 1.

In `SegmentationObject` a pixel has the number of its object, counted from 1 in the order of the annotation file, 0 for
background, or 255 where objects border on each other or on what is not labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Ref
from pipelines.data.formats.boxes import Annotation
from pipelines.data.formats.encoded_image import DecodeError, mask_ids
from pipelines.data.formats.png import encode_png
from pipelines.data.formats.voc_xml import VocAnnotation
from pipelines.data.shards.sample import DataError

VOID = 255


def plan(raw: Path, ref: Ref, annotation: VocAnnotation, kept: Sequence[bool]) -> dict[str, object] | None:
    """The JSON value from which `draw` draws the mask; None if ids are not those of the objects.

    The segmentation's ids are those of the annotated objects if the sizes agree, no id is above the number of objects, and every
    object that is seen has most of its pixels in its box.

    Args:
        raw: the folder that `ref` is relative to.
        ref: the segmentation.
        annotation: of the same image.
        kept: for each object, whether it is a box of the sample.

    Raises:
        DataError: the segmentation is gone or does not decode.
    """
    ids = _read(raw, ref)
    if ids.shape != (annotation.height, annotation.width) or len(annotation.objects) >= VOID:
        return None
    seen = set(np.unique(ids).tolist()) - {0, VOID}
    if seen and max(seen) > len(annotation.objects):
        return None
    for number in seen:
        xmin, ymin, xmax, ymax = (max(0, round(corner)) for corner in annotation.objects[number - 1].corners)
        if 2 * np.count_nonzero(ids[ymin:ymax, xmin:xmax] == number) < np.count_nonzero(ids == number):
            return None
    numbers = np.cumsum(kept) * np.asarray(kept, bool)
    return {"segmentation": ref, "numbers": numbers.tolist()}


def draw(raw: Path, annotation: Annotation) -> bytes:
    """The PNG of instance ids; objects without a box and void borders are background. See `plan`."""
    table = np.zeros(VOID + 1, np.uint8)
    numbers = annotation.mask["numbers"]
    table[1 : 1 + len(numbers)] = numbers
    return encode_png(table[_read(raw, Ref(*annotation.mask["segmentation"]))], deflate=True)


def _read(raw: Path, ref: Ref) -> np.ndarray:
    """The ids of a segmentation, (H, W)."""
    try:
        return mask_ids(archive.read(raw, ref))
    except DecodeError as error:
        raise DataError(f"{ref.path}: {error}; get it again") from None
