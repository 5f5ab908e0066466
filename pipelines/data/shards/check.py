"""Checks of a sample before it is written to a shard."""

from __future__ import annotations

from contextlib import suppress

from pipelines.data.formats.encoded_image import DecodeError, image_size, mask_ids
from pipelines.data.shards.sample import KEY, LONGEST_KEY, DataError, Description, Sample

EXTENSIONS = ("jpg", "png", "webp")


def check_sample(sample: Sample, description: Description) -> None:
    """Raises `DataError` unless `sample` fits the data set that `description` describes.

    Images are not decoded, because the loader handles images that do not decode (`data.on_error`). If the
    header of an image cannot be read, its boxes and mask are not compared with its size.
    """
    if not KEY.fullmatch(sample.key):
        raise DataError(
            f"key {sample.key!r}: a key is 1 to {LONGEST_KEY} characters of letters, digits, "
            "'_' and '-' alone"
        )
    if sample.extension not in EXTENSIONS:
        raise DataError(f"{sample.key}: extension {sample.extension!r} is not one of {', '.join(EXTENSIONS)}")
    _check_labels(sample, description)
    if not all(caption.strip() for caption in sample.captions):
        raise DataError(f"{sample.key}: an empty caption; a caption has words")
    if sample.group is not None and sample.group < 0:
        raise DataError(f"{sample.key}: group {sample.group} is below 0")
    if sample.boxes or sample.mask is not None:
        _check_geometry(sample, len(description.classes))


def _check_labels(sample: Sample, description: Description) -> None:
    """Raises `DataError` if a label that the task needs is missing, out of range or given twice."""
    classes = len(description.classes)
    match description.task:
        case "multiclass":
            if sample.label is None:
                raise DataError(f"{sample.key}: no label; task multiclass needs one")
            labels: tuple[int, ...] = (sample.label,)
        case "multilabel":
            if sample.labels is None:
                raise DataError(
                    f"{sample.key}: no labels; task multilabel needs a list of them, which may be empty"
                )
            if len(set(sample.labels)) < len(sample.labels):
                raise DataError(f"{sample.key}: labels {sample.labels} name a class twice")
            labels = sample.labels
        case "caption":
            if not sample.captions:
                raise DataError(f"{sample.key}: no caption; task caption needs one")
            labels = ()
        case "unlabelled":
            labels = ()
    for label in labels:
        if not 0 <= label < classes:
            raise DataError(
                f"{sample.key}: label {label} is out of range; there are {classes} classes, "
                f"0 to {classes - 1}"
            )


def _check_geometry(sample: Sample, classes: int) -> None:
    """Raises `DataError` if a box is empty, outside its image or of an unknown class, or the mask misfits."""
    size = mask = None
    with suppress(DecodeError):
        size = image_size(sample.image)
    try:
        mask = None if sample.mask is None else mask_ids(sample.mask)
    except DecodeError as error:
        raise DataError(f"{sample.key}: boxes and mask cannot be checked: {error}") from None
    for box in sample.boxes:
        label, xmin, ymin, xmax, ymax = box
        if not (xmin < xmax and ymin < ymax):  # `not (a < b)` is True for NaN, too
            raise DataError(f"{sample.key}: box {box} is empty; xmin < xmax and ymin < ymax are needed")
        if xmin < 0 or ymin < 0 or (size is not None and (xmax > size[1] or ymax > size[0])):
            where = "" if size is None else f" of {size[1]} x {size[0]} pixels"
            raise DataError(f"{sample.key}: box {box} is outside its image{where}")
        if not 0 <= label < classes:
            raise DataError(f"{sample.key}: box {box} has class {label}; there are {classes} classes")
    if mask is None:
        return
    if size is not None and mask.shape != size:
        raise DataError(
            f"{sample.key}: mask of {mask.shape[1]} x {mask.shape[0]} pixels; "
            f"its image has {size[1]} x {size[0]}"
        )
    if sample.boxes and int(mask.max()) > len(sample.boxes):
        raise DataError(
            f"{sample.key}: mask names instance {int(mask.max())}; there are {len(sample.boxes)} boxes"
        )
