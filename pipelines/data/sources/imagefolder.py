"""`imagefolder`: `split/class/file` in a folder, tar, tar.gz or zip, on this machine or at any fsspec URL."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from numpy.random import Generator, Philox, SeedSequence

from pipelines.data.sample import DataError, Description, Sample
from pipelines.data.sources import archive, images, listing
from pipelines.data.sources.archive import Contents
from pipelines.data.sources.download import download
from pipelines.data.sources.images import Classes
from pipelines.data.sources.listing import Ref
from pipelines.params import DatasetParams, ImageFolderParams

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_UNPACKED = "images.tar"


class StoredImages:
    """How image folders are read once they are fetched."""

    params: DatasetParams

    def describe(self, raw: Path) -> Description:
        """The data set fetched into `raw`."""
        return listing.read_description(raw)

    def index(self, raw: Path, split: str) -> list[Ref]:
        """References sorted by class, then by path; those of `train` shuffled, so that every shard has all classes."""
        refs = listing.read_index(raw, split)
        if split != "train":
            return refs
        order = Generator(Philox(SeedSequence([self.params.split_seed, len(refs)]))).permutation(len(refs))
        return [refs[position] for position in order]

    def load(self, raw: Path, reference: Ref) -> Sample:
        """The sample at `reference`; raises `DataError` where its file is gone, changed or of no use."""
        return images.load_image(raw, reference)


@dataclass(frozen=True)
class ImageFolder(StoredImages):
    """Any data set of images in class folders."""

    params: ImageFolderParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Verifies what lies at `root`; leaves archives unpacked in `raw`, and folders and plain tars where they are."""
        params = self.params
        contents, checksum = open_root(params.root, params.sha256, raw, cache, progress)
        folders = {split: params.splits.get(split, split) for split in ("train", "val", "test")}
        leave(contents, folders, raw, params, source=f"imagefolder: {params.root}", checksum=checksum)


def open_root(root: str, sha256: str | None, raw: Path, cache: Path, progress: bool) -> tuple[Contents, str]:
    """What lies at `root`, and its sha256 (of an archive: its bytes; of a folder: its sorted paths and sizes).

    Raises:
        DataError: nothing is there, or not what `sha256` says.
    """
    raw.mkdir(parents=True, exist_ok=True)
    path = Path(os.path.abspath(os.path.expanduser(root.removeprefix("file://"))))
    remote = "://" in root and not root.startswith("file://")
    if remote and root.endswith(_ARCHIVES):
        path = cache / f"{hashlib.sha256(root.encode()).hexdigest()[:12]}-{posixpath.basename(root)}"
        download(root, path, digest=sha256 and f"sha256:{sha256}", progress=progress)
    elif remote or path.is_dir():
        if sha256 is not None:
            raise DataError(f"{root}: sha256 is of a file, and this is a folder: leave sha256 out")
        contents = archive.list_folder(root if remote else str(path))
        return contents, listing.combined_sha256({name: str(item.size) for name, item in contents.files.items()})
    elif not path.is_file():
        raise DataError(f"{root}: no such file or folder")
    found = listing.sha256_of(path)
    if sha256 is not None and found != sha256:
        raise DataError(f"{root}: has sha256 {found}, where {sha256} was expected")
    return _open_archive(path, raw, in_place=not remote, progress=progress), found


def _open_archive(path: Path, raw: Path, *, in_place: bool, progress: bool) -> Contents:
    """The contents of an archive on this machine, which is unpacked into `raw` unless it can be read where it is."""
    if archive.is_plain_tar(path):
        if in_place:
            return archive.list_tar(path, str(path), str(path))
        archive.copy(path, raw / _UNPACKED)
    else:
        archive.to_tar(path, raw / _UNPACKED, progress)
    return archive.list_tar(raw / _UNPACKED, _UNPACKED, str(path))


def leave(
    contents: Contents,
    folders: Mapping[str, str],
    raw: Path,
    params: DatasetParams,
    *,
    source: str,
    checksum: str,
    train_optional: bool = False,
) -> None:
    """Writes the indexes and the manifest of a data set whose splits lie in `folders` (split -> folder).

    Where there is no folder for `val`, `params.val_count` images are held out of `train`.

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
    if refs["train"] and not refs["val"]:
        if params.val_count is None:
            raise DataError(f"{source}: has no validation images: set val_count, how many to hold out of train")
        refs["train"], refs["val"] = images.split_off(refs["train"], params.val_count, params.split_seed)
    for split, listed in refs.items():
        listing.write_index(raw, split, listed)
    counts = {split: len(listed) for split, listed in refs.items()}
    listing.write_manifest(raw, Description(classes, "multiclass", source, checksum, counts))


def _class_names(found: Mapping[str, Classes], source: str, folders: Mapping[str, str]) -> tuple[str, ...]:
    """The names of all classes, sorted; each must be in `train`, where there is one."""
    names = sorted(set().union(*found.values()))
    for split in found:
        missing = sorted(set(found[split]) - set(found["train"])) if found["train"] else []
        if missing:
            raise DataError(f"{source}: class {missing[0]} is in {folders[split]} but not in {folders['train']}")
    return tuple(names)
