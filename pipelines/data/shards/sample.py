"""Samples of a data set, its description, and the one kind of error that bad data raises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import UserError

Task = Literal["multiclass", "multilabel", "caption", "unlabelled"]
Box = tuple[int, float, float, float, float]

LONGEST_KEY = 90  # so that `<key>.mask.png` fits into the 100 bytes of a tar header's name
KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")


class DataError(UserError, ValueError):
    """Bad data: one line that names the file or sample and says what would be right."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its labels, boxes, group, captions and mask.

    Attributes:
        key: unique in its split, and matches `KEY`; `raw.keys` makes such keys.
        image: the encoded image, as the source has it.
        extension: `jpg`, `png` or `webp`.
        label: class index, if the task is multiclass.
        labels: class indices in ascending order, if the task is multilabel.
        boxes: (class, xmin, ymin, xmax, ymax) each; pixels of the stored image, half-open.
        group: index of the background, or of another attribute that may be confused with the class.
        captions: one or several texts that each describe the whole image.
        mask: grey PNG of instance ids: 0 is background, i is the instance of `boxes[i - 1]`.
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
    """A data set as a whole: classes in label order, task, source, number of samples per split."""

    classes: tuple[str, ...]
    task: Task
    source: str
    checksum: str  # sha256 of what the samples are made of
    counts: dict[str, int]


def caption_entry(captions: tuple[str, ...]) -> dict[str, Any]:
    """How the json and the index store captions: `caption`, a str, if there is one; `captions`, a list, if there are several."""
    if len(captions) > 1:
        return {"captions": list(captions)}
    return {"caption": captions[0]} if captions else {}


def captions_of(annotation: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions that `caption_entry` stored in the json or index line of a sample."""
    return tuple(
        annotation["captions"]
        if "captions" in annotation
        else [annotation["caption"]]
        if "caption" in annotation
        else ()
    )
