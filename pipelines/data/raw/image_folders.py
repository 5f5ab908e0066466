"""Images in class folders: how sources list them in `raw`, and read them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents, Ref
from pipelines.data.raw import images, listing
from pipelines.data.raw.images import Classes
from pipelines.data.raw.listing import ListedImages
from pipelines.data.shards.sample import DataError, Description, Sample
from pipelines.params import DatasetParams


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
    found = {split: images.classes_of(contents, folder, source) for split, folder in folders.items()}
    for split in ("train", "test"):
        if not found[split] and not (split == "train" and train_optional):
            top = sorted({name.partition("/")[0] for name in archive.visible(contents.files)})
            raise DataError(f"{source}: no images in {folders[split]}/<class>/; there is: {', '.join(top[:10]) or 'nothing'}")
    classes = _class_names(found, source, folders)
    refs = {split: images.references(contents, found.get(split, {}), classes) for split in ("train", "val", "test")}
    _write(refs, raw, params, Description(classes, "multiclass", source, checksum, {}))


def write_unlabelled(
    contents: Contents, folders: Mapping[str, str], raw: Path, params: DatasetParams, *, source: str, checksum: str
) -> None:
    """Writes the indexes and the manifest of images anywhere below the folders of their splits.

    `test` may be missing.

    Raises:
        DataError: `train` is missing or empty.
    """
    refs = {split: images.unlabelled(contents, folder) for split, folder in folders.items()}
    if not refs["train"]:
        raise DataError(f"{source}: no images in {folders['train']}/")
    _write(refs, raw, params, Description((), "unlabelled", source, checksum, {}))


def _write(refs: dict[str, list[Ref]], raw: Path, params: DatasetParams, description: Description) -> None:
    """Holds validation images out of `train` if there are none, and writes the indexes and the manifest."""
    if refs["train"] and not refs["val"]:
        if params.val_count is None:
            raise DataError(f"{description.source}: has no validation images: set val_count, how many to hold out of train")
        refs["train"], refs["val"] = images.split_off(refs["train"], params.val_count, params.split_seed)
    for split, listed in refs.items():
        listing.write_references(raw, split, listed)
    listing.write_raw_manifest(raw, replace(description, counts={split: len(listed) for split, listed in refs.items()}))


def _class_names(found: Mapping[str, Classes], source: str, folders: Mapping[str, str]) -> tuple[str, ...]:
    """The names of all classes, sorted; each must be in `train`, if that has images."""
    names = sorted(set().union(*found.values()))
    for split in found:
        missing = sorted(set(found[split]) - set(found["train"])) if found["train"] else []
        if missing:
            raise DataError(f"{source}: class {missing[0]} is in {folders[split]} but not in {folders['train']}")
    return tuple(names)
