"""Images with captions in the folder `raw`: listed by sources, and read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipelines.data.formats.archive import Ref
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.raw import images, listing
from pipelines.data.raw.holdout import held_out
from pipelines.data.raw.listing import ListedImages
from pipelines.data.shards.sample import DataError, Description, Sample
from pipelines.params import DatasetParams
from pipelines.storage.files import combined_sha256

SPLITS = ("train", "val", "test")


class CaptionedRef(NamedTuple):
    """A reference to an image, and its captions."""

    image: Ref
    captions: tuple[str, ...]


class CaptionedImages(ListedImages):
    """Base of sources whose images with captions were listed by `write_captioned`."""

    def references(self, raw: Path, split: str) -> list[CaptionedRef]:
        return [
            CaptionedRef(Ref(*image), tuple(captions)) for image, captions in listing.read_lines(raw, split)
        ]

    def load(self, raw: Path, reference: CaptionedRef) -> Sample:
        return replace(images.load_image(raw, reference.image), captions=reference.captions)


def write_captioned(
    found: Mapping[str, Sequence[CaptionedRef]],
    raw: Path,
    params: DatasetParams,
    *,
    source: str,
    checksum: str,
    left_out: LeftOut,
) -> None:
    """Writes the indexes and the manifest of captioned images to `raw`.

    Args:
        found: references by split. If `val` has none, `params.val_count` images are held out of `train`.
        raw: destination folder.
        params: params of the data set.
        source: name of the data set, for messages and the manifest.
        checksum: sha256 of the data set's files. In the manifest, the checksum also covers the captions.
        left_out: counts of the items left out.

    Raises:
        DataError: `train` has no image, or `val` has none and `params.val_count` is not set.
    """
    refs = {split: list(found.get(split, ())) for split in SPLITS}
    if not refs["train"]:
        raise DataError(f"{source}: train has no image with a caption")
    if not refs["val"]:
        if params.val_count is None:
            raise DataError(
                f"{source}: has no validation images: set val_count, how many to hold out of train"
            )
        chosen = held_out([0] * len(refs["train"]), params.val_count, params.split_seed)
        refs["val"] = [ref for place, ref in enumerate(refs["train"]) if place in chosen]
        refs["train"] = [ref for place, ref in enumerate(refs["train"]) if place not in chosen]
    for split, listed in refs.items():
        listing.write_references(raw, split, listed)
    captions = {
        f"{split}/{ref.image.key}": "\n".join(ref.captions)
        for split, listed in refs.items()
        for ref in listed
    }
    counts = {split: len(listed) for split, listed in refs.items()}
    total = combined_sha256({"files": checksum, "captions": combined_sha256(captions)})
    listing.write_raw_manifest(raw, Description((), "caption", source, total, counts), left_out)
