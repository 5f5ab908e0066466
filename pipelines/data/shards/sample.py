"""What every data set gives: samples, their description, and the one kind of error that bad data raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.errors import UserError

Task = Literal["multiclass", "multilabel", "caption", "unlabelled"]
Box = tuple[int, float, float, float, float]


class DataError(UserError, ValueError):
    """Bad data: one line that names the file or sample, and says what would be right."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with what is known about it.

    Attributes:
        key: unique in its split; letters, digits, `_` and `-` alone.
        image: the encoded image, as the source has it.
        extension: `jpg`, `png` or `webp`.
        label: class index, where the task is multiclass.
        labels: class indices in ascending order, where the task is multilabel.
        boxes: (class, xmin, ymin, xmax, ymax) each; pixels of the stored image, half-open.
        group: index of what the class may be confused with, such as the background.
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
    """A data set as a whole: its classes in label order, its task, where it is from, samples a split."""

    classes: tuple[str, ...]
    task: Task
    source: str
    checksum: str  # sha256 of what the samples are made of
    counts: dict[str, int]
