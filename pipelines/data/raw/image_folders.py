"""Images in class folders, or unlabelled: listed in the folder `raw` by sources, and read again."""

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
    """Base of sources whose images were listed by `write_labelled` or `write_unlabelled`."""

    def load(self, raw: Path, reference: Ref) -> Sample:
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
    """Writes the indexes and the manifest of images in `<folder of the split>/<class>/` to `raw`.

    If `val` has no images, `params.val_count` images are held out of `train`.

    Args:
        contents: files of the data set.
        folders: split -> folder.
        raw: destination folder.
        params: params of the data set.
        source: name of the data set, for messages and the manifest.
        checksum: sha256 of the data set's files.
        train_optional: allow a data set without training images.

    Raises:
        DataError: `train` or `test` is missing or empty, a class is empty or missing from `train`, or `val`
            is empty and `params.val_count` is not set.
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
    """Writes the indexes and the manifest of images at any depth below the folders of their splits.

    Arguments are those of `write_labelled`. `val` is held out likewise if it is missing; `test` may be
    missing.

    Raises:
        DataError: `train` is missing or empty, or `val` is and `params.val_count` is not set.
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
    """Counts the unusable entries, and the files outside of all splits' folders."""
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
    """Holds validation images out of `train` if `val` is empty; writes the indexes and the manifest."""
    if refs["train"] and not refs["val"]:
        if params.val_count is None:
            raise DataError(
                f"{description.source}: has no validation images: "
                "set val_count, how many to hold out of train"
            )
        refs["train"], refs["val"] = images.split_off(refs["train"], params.val_count, params.split_seed)
    for split, listed in refs.items():
        listing.write_references(raw, split, listed)
    counts = {split: len(listed) for split, listed in refs.items()}
    listing.write_raw_manifest(raw, replace(description, counts=counts), left_out)


def _class_names(found: Mapping[str, Classes], source: str, folders: Mapping[str, str]) -> tuple[str, ...]:
    """The sorted names of all classes; raises `DataError` if `train` has images but lacks a class."""
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
