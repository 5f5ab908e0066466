"""Checks of a sample before it is written to a shard."""

from __future__ import annotations

import re

from pipelines.data.formats.encoded_image import DecodeError, image_size, mask_ids
from pipelines.data.shards.sample import DataError, Description, Sample

KEY = re.compile(r"[A-Za-z0-9_-]+")
LONGEST_KEY = 90  # so that `<key>.mask.png` fits into the 100 bytes of a tar header's name
EXTENSIONS = ("jpg", "png", "webp")


def check_sample(sample: Sample, description: Description) -> None:
    """Raises `DataError` unless `sample` fits the data set that `description` describes.

    The pixels are not decoded, because the reader raises or skips what does not decode; but the size of an image with boxes or
    a mask must be readable to check these.
    """
    if not KEY.fullmatch(sample.key) or len(sample.key) > LONGEST_KEY:
        raise DataError(f"key {sample.key!r}: a key is 1 to {LONGEST_KEY} characters of letters, digits, '_' and '-' alone")
    if sample.extension not in EXTENSIONS:
        raise DataError(f"{sample.key}: extension {sample.extension!r} is not one of {', '.join(EXTENSIONS)}")
    _check_labels(sample, description)
    if sample.group is not None and sample.group < 0:
        raise DataError(f"{sample.key}: group {sample.group} is below 0")
    if sample.boxes or sample.mask is not None:
        _check_geometry(sample, len(description.classes))


def _check_labels(sample: Sample, description: Description) -> None:
    """Raises `DataError` if the label that the task needs is missing or not a class."""
    classes = len(description.classes)
    match description.task:
        case "multiclass":
            if sample.label is None:
                raise DataError(f"{sample.key}: no label; task multiclass needs one")
            labels: tuple[int, ...] = (sample.label,)
        case "multilabel":
            if sample.labels is None:
                raise DataError(f"{sample.key}: no labels; task multilabel needs a list of them, which may be empty")
            if len(set(sample.labels)) < len(sample.labels):
                raise DataError(f"{sample.key}: labels {sample.labels} name a class twice")
            labels = sample.labels
        case "caption":
            if sample.caption is None:
                raise DataError(f"{sample.key}: no caption; task caption needs one")
            labels = ()
        case "unlabelled":
            labels = ()
    for label in labels:
        if not 0 <= label < classes:
            raise DataError(f"{sample.key}: label {label} is out of range; there are {classes} classes, 0 to {classes - 1}")


def _check_geometry(sample: Sample, classes: int) -> None:
    """Raises `DataError` if a box is empty, outside its image or of no class, or the mask does not fit."""
    try:
        height, width = image_size(sample.image)
        mask = None if sample.mask is None else mask_ids(sample.mask)
    except DecodeError as error:
        raise DataError(f"{sample.key}: boxes and mask cannot be checked: {error}") from None
    for box in sample.boxes:
        label, xmin, ymin, xmax, ymax = box
        if not (xmin < xmax and ymin < ymax):  # so written, NaN is caught as well
            raise DataError(f"{sample.key}: box {box} is empty; xmin < xmax and ymin < ymax are needed")
        if xmin < 0 or ymin < 0 or xmax > width or ymax > height:
            raise DataError(f"{sample.key}: box {box} is outside its image of {width} x {height} pixels")
        if not 0 <= label < classes:
            raise DataError(f"{sample.key}: box {box} has class {label}; there are {classes} classes")
    if mask is None:
        return
    if tuple(mask.shape) != (height, width):
        raise DataError(f"{sample.key}: mask of {mask.shape[1]} x {mask.shape[0]} pixels; its image has {width} x {height}")
    if sample.boxes and int(mask.max()) > len(sample.boxes):
        raise DataError(f"{sample.key}: mask names instance {int(mask.max())}; there are {len(sample.boxes)} boxes")
