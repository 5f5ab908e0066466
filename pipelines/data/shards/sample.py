"""A sample, the description of a data set, and `DataError`, which all bad data raises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import UserError

Task = Literal["multiclass", "multilabel", "caption", "unlabelled"]
Box = tuple[int, float, float, float, float]

LONGEST_KEY = 90  # `<key>.mask.png` must fit into the 100 bytes of the name in a tar header
KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")


class DataError(UserError, ValueError):
    """Bad data. One line names the file or sample and says what would be right."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its labels, boxes, group, captions and mask.

    Attributes:
        key: unique in its split; matches `KEY`. `raw.keys` makes such keys.
        image: the encoded image; its bytes are the source's.
        extension: `jpg`, `png` or `webp`.
        label: class index if the task is multiclass, else `None`.
        labels: class indices in ascending order if the task is multilabel, else `None`.
        boxes: tuples (class, xmin, ymin, xmax, ymax) in pixels of the stored image, half-open.
        group: index of the background, or of another attribute that correlates with the class.
        captions: texts, each of which describes the whole image.
        mask: grey PNG of instance ids. 0 is background, i is the instance of `boxes[i - 1]`.
    """

    key: str
    image: bytes
    extension: str
    label: int | None = None
    labels: tuple[int, ...] | None = None
    boxes: tuple[Box, ...] = ()
    group: int | None = None
    captions: tuple[str, ...] = ()
    mask: bytes | None = None


@dataclass(frozen=True)
class Description:
    """A data set: classes in label order, task, source, checksum, samples per split."""

    classes: tuple[str, ...]
    task: Task
    source: str
    checksum: str  # sha256 of the source's data
    counts: dict[str, int]


def caption_entry(captions: tuple[str, ...]) -> dict[str, Any]:
    """Entry of a json or index line: `caption` (str) for one caption, `captions` (list) for several."""
    if len(captions) > 1:
        return {"captions": list(captions)}
    return {"caption": captions[0]} if captions else {}


def captions_of(annotation: Mapping[str, Any]) -> tuple[str, ...]:
    """Captions in a sample's json or index line, as `caption_entry` stored them."""
    return tuple(
        annotation["captions"]
        if "captions" in annotation
        else [annotation["caption"]]
        if "caption" in annotation
        else ()
    )
