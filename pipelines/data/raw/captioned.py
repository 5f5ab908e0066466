"""Images with captions: how sources list them in `raw`, and read them again."""

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
    """Reads the images with captions that `write_captioned` has listed."""

    def references(self, raw: Path, split: str) -> list[CaptionedRef]:
        """References in the source's order; raises `DataError` if the split or the fetch is missing."""
        return [
            CaptionedRef(Ref(*image), tuple(captions)) for image, captions in listing.read_lines(raw, split)
        ]

    def load(self, raw: Path, reference: CaptionedRef) -> Sample:
        """The sample at `reference`; raises `DataError` if its file is gone or changed."""
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
        found: references by split. If there are none for `val`, `params.val_count` images are held out of `train`.
        raw: where to write.
        params: of the data set.
        source: its name, for messages and the manifest.
        checksum: sha256 of its files; the manifest's covers the captions as well.
        left_out: what its samples lack.

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
