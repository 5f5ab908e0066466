"""Images in class folders: how sources list them in `raw`, and read them again."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents, Ref
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.raw import images, listing
from pipelines.data.raw.images import Classes
from pipelines.data.raw.listing import ListedImages
from pipelines.data.shards.sample import DataError, Description, Sample
from pipelines.params import DatasetParams

log = logging.getLogger(__name__)


class StoredImages(ListedImages):
    """Reads the image folders that `write_labelled` or `write_unlabelled` has listed."""

    def load(self, raw: Path, reference: Ref) -> Sample:
        """The sample at `reference`; raises `DataError` where its file is gone, changed or does not decode."""
        return images.load_image(raw, reference)


def write_labelled(
    contents: Contents,
    folders: Mapping[str, str],
    raw: Path,
    params: DatasetParams,
    *,
    source: str,
    checksum: str,
    train_optional: bool = False,
) -> None:
    """Writes the indexes and the manifest of images in class folders below the folders of their splits.

    `folders` is split -> folder. If there is no folder for `val`, `params.val_count` images are held out of `train`.

    Raises:
        DataError: a split is missing or empty, a class is empty, or a class is missing from `train`.
    """
    left_out = _outside(contents, folders)
    found = {
        split: images.classes_of(contents, folder, source, left_out) for split, folder in folders.items()
    }
    for split in ("train", "test"):
        if not found.get(split) and not (split == "train" and train_optional):
            there = archive.top_names(contents.files)
            raise DataError(f"{source}: no images in {folders.get(split, split)}/<class>/; there is: {there}")
    classes = _class_names(found, source, folders)
    refs = {
        split: images.references(contents, folders[split], found[split], classes) if split in folders else []
        for split in ("train", "val", "test")
    }
    _write(refs, raw, params, Description(classes, "multiclass", source, checksum, {}), left_out)


def write_unlabelled(
    contents: Contents,
    folders: Mapping[str, str],
    raw: Path,
    params: DatasetParams,
    *,
    source: str,
    checksum: str,
) -> None:
    """Writes the indexes and the manifest of images anywhere below the folders of their splits.

    `test` may be missing.

    Raises:
        DataError: `train` is missing or empty.
    """
    left_out = _outside(contents, folders)
    refs = {
        split: images.unlabelled(contents, folders[split], source, left_out) if split in folders else []
        for split in ("train", "val", "test")
    }
    if not refs["train"]:
        raise DataError(
            f"{source}: no images in {folders['train']}/; there is: {archive.top_names(contents.files)}"
        )
    _write(refs, raw, params, Description((), "unlabelled", source, checksum, {}), left_out)


def _outside(contents: Contents, folders: Mapping[str, str]) -> LeftOut:
    """What is left out so far: unusable entries, and files that are in the folder of no split."""
    left_out = contents.left_out()
    prefixes = tuple(f"{posixpath.normpath(folder)}/" for folder in folders.values())
    reason = f"files outside of {', '.join(prefixes)}"
    for path in sorted(contents.files):
        if not path.startswith(prefixes):
            left_out.add(reason, path)
    return left_out


def _write(
    refs: dict[str, list[Ref]], raw: Path, params: DatasetParams, description: Description, left_out: LeftOut
) -> None:
    """Holds validation images out of `train` if there are none, and writes the indexes and the manifest."""
    if refs["train"] and not refs["val"]:
        if params.val_count is None:
            raise DataError(
                f"{description.source}: has no validation images: set val_count, how many to hold out of train"
            )
        refs["train"], refs["val"] = images.split_off(refs["train"], params.val_count, params.split_seed)
    for split, listed in refs.items():
        listing.write_references(raw, split, listed)
    counts = {split: len(listed) for split, listed in refs.items()}
    listing.write_raw_manifest(raw, replace(description, counts=counts), left_out)


def _class_names(found: Mapping[str, Classes], source: str, folders: Mapping[str, str]) -> tuple[str, ...]:
    """The names of all classes, sorted; each must be in `train`, if that has images."""
    names = sorted(set().union(*found.values()))
    for split in found:
        missing = sorted(set(found[split]) - set(found["train"])) if found["train"] else []
        if missing:
            raise DataError(
                f"{source}: class {missing[0]} is in {folders[split]} but not in {folders['train']}"
            )
    for one, other in pairwise(sorted(names, key=lambda name: (name.casefold(), name))):
        if one.casefold() == other.casefold():
            log.warning(
                "%s: classes %s and %s differ in upper and lower case alone: they are two classes",
                source,
                one,
                other,
            )
    return tuple(names)
