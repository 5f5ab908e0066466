"""Images with boxes: how sources that read annotation files write them to `raw`, and read them again.

`<split>.annotations.jsonl` has one line an image, checked and in the project's own pixels; the index says where each line
and each image lies, so that no process that writes shards parses the original annotations again.
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
    """References to an image and its annotation."""

    image: Ref
    annotation: Ref


class AnnotatedImages(ListedImages):
    """Reads the images with boxes that `write_split` has written."""

    def references(self, raw: Path, split: str) -> list[AnnotatedRef]:
        """References in the source's order; raises `DataError` if the split or the fetch is missing."""
        return [
            AnnotatedRef(Ref(*image), Ref(*annotation))
            for image, annotation in listing.read_lines(raw, split)
        ]

    def load(self, raw: Path, reference: AnnotatedRef) -> Sample:
        """The sample at `reference`.

        Raises:
            DataError: a file is gone or changed, or an image with boxes has not the size that they were drawn on.
        """
        annotation = _LINE.validate_python(json.loads(archive.read(raw, reference.annotation)))
        sample = images.load_image(raw, reference.image)
        if annotation.boxes:
            with suppress(
                DecodeError
            ):  # training raises or skips what does not decode, as `data.on_error` says
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
        """The PNG of instance ids; None if the source has no mask of this image."""
        return None


def _check_size(found: tuple[int, int], annotation: Annotation, path: str) -> None:
    """Raises `DataError` unless the size `found` of an image, (height, width), is the one that its boxes were drawn on."""
    height, width = found
    if (width, height) != (annotation.width, annotation.height):
        drawn = f"{annotation.width} x {annotation.height}"
        raise DataError(f"{path}: has {width} x {height} pixels; its boxes were drawn on {drawn}")


def write_split(raw: Path, split: str, samples: Iterable[tuple[Ref, Annotation]]) -> int:
    """Writes the index and annotations of one split to `raw`, in their order; returns their number."""
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
    """Writes the manifest of the splits to `raw`, with the numbers of things left out, and logs these.

    Args:
        raw: has every split, as `write_split` wrote it.
        description: of the data set; the manifest's checksum covers the annotations as well.
        check: the one that all boxes went through.

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
    """The file of a split's annotations."""
    return raw / f"{split}.annotations.jsonl"
