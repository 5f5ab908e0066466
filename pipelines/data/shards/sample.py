"""Samples of a data set, its description, and the one kind of error that bad data raises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import UserError

Task = Literal["multiclass", "multilabel", "caption", "unlabelled"]
Box = tuple[int, float, float, float, float]

LONGEST_KEY = 90  # so that `<key>.mask.png` fits into the 100 bytes of a tar header's name
KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")


class DataError(UserError, ValueError):
    """Bad data: one line that names the file or sample and says what would be right."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its labels, boxes, group, caption and mask.

    Attributes:
        key: unique in its split, and matches `KEY`; `raw.keys` makes such keys.
        image: the encoded image, as the source has it.
        extension: `jpg`, `png` or `webp`.
        label: class index, if the task is multiclass.
        labels: class indices in ascending order, if the task is multilabel.
        boxes: (class, xmin, ymin, xmax, ymax) each; pixels of the stored image, half-open.
        group: index of the background, or of another attribute that may be confused with the class.
        caption: one sentence.
        mask: grey PNG of instance ids: 0 is background, i is the instance of `boxes[i - 1]`.
    """

    key: str
    image: bytes
    extension: str
    label: int | None = None
    labels: tuple[int, ...] | None = None
    boxes: tuple[Box, ...] = ()
    group: int | None = None
    caption: str | None = None
    mask: bytes | None = None


@dataclass(frozen=True)
class Description:
    """A data set as a whole: classes in label order, task, source, number of samples per split."""

    classes: tuple[str, ...]
    task: Task
    source: str
    checksum: str  # sha256 of what the samples are made of
    counts: dict[str, int]
