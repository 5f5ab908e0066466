"""PASCAL VOC's segmentations as masks of instance ids: id i is `boxes[i - 1]`.

In `SegmentationObject` each pixel has the number of its object, counted from 1 in the order of the annotation
file. In `SegmentationClass` each pixel has the number of its class, counted from 1 in the order of
`voc_xml.CLASSES`. In both, 0 is background, and 255 (void) marks borders of objects and unlabelled pixels.
Masks are made in two steps: a plan (JSON) when the data set is fetched, and its drawing when a sample is
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Ref
from pipelines.data.formats.boxes import Annotation, Corners
from pipelines.data.formats.encoded_image import DecodeError, mask_ids
from pipelines.data.formats.png import encode_png
from pipelines.data.formats.voc_xml import CLASSES, VocAnnotation
from pipelines.data.shards.sample import DataError

VOID = 255


def plan(raw: Path, ref: Ref, annotation: VocAnnotation, kept: Sequence[bool]) -> dict[str, object] | None:
    """The JSON value from which `draw` draws an instance mask; `None` if it does not fit the annotation.

    The segmentation fits if its size is the annotation's, no id exceeds the number of objects, and each
    object in it has at least half of its pixels in its box.

    Args:
        raw: the folder that `ref` is relative to.
        ref: the segmentation.
        annotation: annotation of the same image.
        kept: for each object, True if it is a box of the sample.

    Raises:
        DataError: the segmentation is missing or does not decode.
    """
    ids = _read(raw, ref)
    if ids.shape != (annotation.height, annotation.width) or len(annotation.objects) >= VOID:
        return None
    seen = set(np.unique(ids).tolist()) - {0, VOID}
    if seen and max(seen) > len(annotation.objects):
        return None
    for number in seen:
        xmin, ymin, xmax, ymax = _pixels(annotation.objects[number - 1].corners)
        if 2 * np.count_nonzero(ids[ymin:ymax, xmin:xmax] == number) < np.count_nonzero(ids == number):
            return None
    return {"segmentation": ref, "numbers": _numbers(kept)}


def plan_classes(
    raw: Path, ref: Ref, annotation: VocAnnotation, kept: Sequence[bool]
) -> dict[str, object] | None:
    """As `plan`, for a class segmentation.

    A class segmentation does not separate the objects of one class. So each pixel of class c goes to the
    smallest box of class c that contains the pixel (of boxes with equal area, to the first). A pixel in no
    box of its class is background.

    The segmentation fits if its size is the annotation's, and every number in it is a class's, 0 or void.

    Args:
        raw: the folder that `ref` is relative to.
        ref: the class segmentation.
        annotation: annotation of the same image.
        kept: for each object, True if it is a box of the sample. Pixels of the other objects become
            background.

    Raises:
        DataError: the segmentation is missing or does not decode.
    """
    classes = _read(raw, ref)
    if classes.shape != (annotation.height, annotation.width) or len(annotation.objects) >= VOID:
        return None
    if classes[classes != VOID].max(initial=0) > len(CLASSES):
        return None
    regions = [(item.label + 1, *_pixels(item.corners)) for item in annotation.objects]
    smallest_last = sorted(zip(_numbers(kept), regions, strict=True), key=lambda item: _area(*item[1][1:]))[
        ::-1
    ]
    return {"classes": ref, "objects": [(number, *region) for number, region in smallest_last]}


def draw(raw: Path, annotation: Annotation) -> bytes:
    """The PNG of instance ids from a plan; void and objects without a box are background."""
    mask = annotation.mask
    if "classes" in mask:
        ids = _draw_objects(_read(raw, Ref(*mask["classes"])), mask["objects"])
    else:
        table = np.zeros(VOID + 1, np.uint8)
        table[1 : 1 + len(mask["numbers"])] = mask["numbers"]
        ids = table[_read(raw, Ref(*mask["segmentation"]))]
    return encode_png(ids, deflate=True)


def _draw_objects(classes: np.ndarray, objects: Sequence[Sequence[int]]) -> np.ndarray:
    """Instance ids (H, W), uint8, from a class segmentation (H, W).

    Each object is (id, number of its class, xmin, ymin, xmax, ymax). Later objects overwrite earlier ones.
    """
    ids = np.zeros(classes.shape, np.uint8)
    for number, value, xmin, ymin, xmax, ymax in objects:
        box = np.s_[ymin:ymax, xmin:xmax]
        ids[box][classes[box] == value] = number
    return ids


def _numbers(kept: Sequence[bool]) -> list[int]:
    """The instance id of each object: 1, 2, ... for the objects that are kept, 0 for the others."""
    return (np.cumsum(kept) * np.asarray(kept, bool)).tolist()


def _pixels(corners: Corners) -> tuple[int, int, int, int]:
    """The half-open box, rounded to whole pixels, with negative corners set to 0."""
    xmin, ymin, xmax, ymax = (max(0, round(corner)) for corner in corners)
    return xmin, ymin, xmax, ymax


def _area(xmin: int, ymin: int, xmax: int, ymax: int) -> int:
    return (xmax - xmin) * (ymax - ymin)


def _read(raw: Path, ref: Ref) -> np.ndarray:
    """The numbers (H, W) of a segmentation."""
    try:
        return mask_ids(archive.read(raw, ref))
    except DecodeError as error:
        raise DataError(f"{ref.path}: {error}; get it again") from None
