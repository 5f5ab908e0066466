"""PASCAL VOC's annotation files: one XML per image."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from xml.etree import ElementTree

from pipelines.data.formats.boxes import Corners
from pipelines.data.shards.sample import DataError

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


@dataclass(frozen=True)
class VocObject:
    """One object. Its `corners` count from 0, are half-open, and are not yet checked against the image."""

    label: int
    corners: Corners
    difficult: bool


@dataclass(frozen=True)
class VocAnnotation:
    """The size of an image in pixels, and its objects in the order of their ids in segmentations."""

    width: int
    height: int
    objects: tuple[VocObject, ...]


def parse(content: bytes, path: str) -> VocAnnotation:
    """Parses the content of an annotation file.

    VOC counts pixels from 1, and its xmax is the last pixel inside the box. So the half-open interval is
    [xmin - 1, xmax), likewise for y.

    Raises:
        DataError: the XML is not well-formed, a field is missing, or the class is not one of VOC's. The error
            names `path`.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not whole XML ({error}): get it again") from None
    width, height = (int(_number(root, f"size/{side}", path)) for side in ("width", "height"))
    return VocAnnotation(width, height, tuple(_object(element, path) for element in root.findall("object")))


def _object(element: ElementTree.Element, path: str) -> VocObject:
    """Parses one `<object>`. The boxes of its parts, such as hands, are ignored."""
    name = _text(element, "name", path)
    if name not in CLASSES:
        raise DataError(f"{path}: class {name!r} is not one of VOC's: {', '.join(CLASSES)}")
    xmin, ymin, xmax, ymax = (
        _number(element, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    difficult = element.findtext("difficult", "0").strip() == "1"
    return VocObject(CLASSES.index(name), (xmin - 1, ymin - 1, xmax, ymax), difficult)


def _text(element: ElementTree.Element, tag: str, path: str) -> str:
    """The text of the child `tag`, stripped; raises `DataError` if it is missing or blank."""
    text = element.findtext(tag)
    if text is None or not text.strip():
        raise DataError(f"{path}: <{element.tag}> has no {tag}")
    return text.strip()


def _number(element: ElementTree.Element, tag: str, path: str) -> float:
    """The number in the child `tag`; raises `DataError` if it is not finite."""
    text = _text(element, tag, path)
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise DataError(f"{path}: <{element.tag}> has {tag} {text!r}, which is not a number")
