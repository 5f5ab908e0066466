"""Images with boxes in the folder `raw`: written by sources with annotation files, and read again.

`<split>.annotations.jsonl` has one checked annotation per line, with half-open boxes. The index has the
location of each line and each image. So the processes that write shards do not parse the original annotation
files again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Ref
from pipelines.data.formats.boxes import Annotation, BoxCheck
from pipelines.data.formats.encoded_image import DecodeError, image_size
from pipelines.data.raw import images, listing
from pipelines.data.raw.listing import ListedImages
from pipelines.data.shards.sample import DataError, Description, Sample
from pipelines.storage.files import combined_sha256, file_digest, staged

SPLITS = ("train", "val", "test")
_LINE = TypeAdapter(Annotation)


class AnnotatedRef(NamedTuple):
    """References to an image and to its line in `<split>.annotations.jsonl`."""

    image: Ref
    annotation: Ref


class AnnotatedImages(ListedImages):
    """Base of sources whose images with boxes were written by `write_split`."""

    def references(self, raw: Path, split: str) -> list[AnnotatedRef]:
        return [
            AnnotatedRef(Ref(*image), Ref(*annotation))
            for image, annotation in listing.read_lines(raw, split)
        ]

    def load(self, raw: Path, reference: AnnotatedRef) -> Sample:
        """The sample at `reference`.

        Raises:
            DataError: a file is missing or has changed, or an image with boxes has another size than its
                annotation.
        """
        annotation = _LINE.validate_python(json.loads(archive.read(raw, reference.annotation)))
        sample = images.load_image(raw, reference.image)
        if annotation.boxes:
            # An image that does not decode is kept: training raises an error or skips it (`data.on_error`).
            with suppress(DecodeError):
                _check_size(image_size(sample.image), annotation, reference.image.path)
        return replace(
            sample,
            boxes=annotation.boxes,
            label=annotation.label,
            labels=annotation.labels,
            group=annotation.group,
            mask=self.draw_mask(raw, annotation),
        )

    def draw_mask(self, raw: Path, annotation: Annotation) -> bytes | None:
        """The PNG of instance ids; `None` if the source has no mask of this image."""
        return None


def _check_size(found: tuple[int, int], annotation: Annotation, path: str) -> None:
    """Raises `DataError` unless the image size `found` (height, width) is that of the annotation."""
    height, width = found
    if (width, height) != (annotation.width, annotation.height):
        drawn = f"{annotation.width} x {annotation.height}"
        raise DataError(f"{path}: has {width} x {height} pixels; its boxes were drawn on {drawn}")


def write_split(raw: Path, split: str, samples: Iterable[tuple[Ref, Annotation]]) -> int:
    """Writes the index and annotations of one split to `raw`, in the given order; returns their number."""
    path = annotations_path(raw, split)
    refs = []
    with staged(path) as unfinished, unfinished.open("wb") as file:
        for image, annotation in samples:
            line = (json.dumps(asdict(annotation), separators=(",", ":")) + "\n").encode()
            refs.append(AnnotatedRef(image, Ref(image.key, path.name, file.tell(), len(line))))
            file.write(line)
    listing.write_references(raw, split, refs)
    return len(refs)


def write_description(raw: Path, description: Description, check: BoxCheck) -> None:
    """Writes the manifest to `raw`, with the counts of clipped boxes and items left out; logs the latter.

    Args:
        raw: folder in which `write_split` has written every split.
        description: description of the data set. In the manifest, its checksum also covers the annotations.
        check: the check that all boxes went through.

    Raises:
        DataError: a split has no image.
    """
    for split in SPLITS:
        if not description.counts[split]:
            raise DataError(f"{description.source}: {split} has no image")
    sums = {split: file_digest(annotations_path(raw, split)) for split in SPLITS}
    checksum = combined_sha256({"files": description.checksum, **sums})
    listing.write_raw_manifest(
        raw, replace(description, checksum=checksum), check.left_out, boxes_clipped=check.clipped
    )


def annotations_path(raw: Path, split: str) -> Path:
    """Path of a split's annotations."""
    return raw / f"{split}.annotations.jsonl"
