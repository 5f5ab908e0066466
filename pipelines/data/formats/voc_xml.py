"""PASCAL VOC's annotation files: one XML an image."""

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
    """One object; `corners` are 0-based and half-open, and not yet checked against the image."""

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
    """The content of an annotation file.

    VOC counts pixels from 1 and names the last one within the box: `xmin - 1` and `xmax` are the half-open box.

    Raises:
        DataError: the XML is cut short, a field is missing, or the class is not one of VOC's; the error names `path`.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not whole XML ({error}): get it again") from None
    width, height = (int(_number(root, f"size/{side}", path)) for side in ("width", "height"))
    return VocAnnotation(width, height, tuple(_object(element, path) for element in root.findall("object")))


def _object(element: ElementTree.Element, path: str) -> VocObject:
    """One `<object>`. Its parts, such as hands, have boxes of their own, which are ignored."""
    name = _text(element, "name", path)
    if name not in CLASSES:
        raise DataError(f"{path}: class {name!r} is not one of VOC's: {', '.join(CLASSES)}")
    xmin, ymin, xmax, ymax = (
        _number(element, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    difficult = element.findtext("difficult", "0").strip() == "1"
    return VocObject(CLASSES.index(name), (xmin - 1, ymin - 1, xmax, ymax), difficult)


def _text(element: ElementTree.Element, tag: str, path: str) -> str:
    """The text of a child."""
    text = element.findtext(tag)
    if text is None or not text.strip():
        raise DataError(f"{path}: <{element.tag}> has no {tag}")
    return text.strip()


def _number(element: ElementTree.Element, tag: str, path: str) -> float:
    """The number in a child."""
    text = _text(element, tag, path)
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise DataError(f"{path}: <{element.tag}> has {tag} {text!r}, which is not a number")
