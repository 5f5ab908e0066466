"""Opens a data set: a folder or archive of the user (`root`), or its official archives."""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.data.formats.archive import Contents, Member
from pipelines.data.formats.download import download, is_file
from pipelines.data.formats.folders import list_folder
from pipelines.data.formats.packed import kind_of, to_tar
from pipelines.data.formats.tars import list_tar
from pipelines.data.shards.sample import DataError
from pipelines.storage.files import combined_sha256, file_digest, staged
from pipelines.storage.paths import users_path

_LONGEST = 100  # characters of a downloaded file's name
_UNPACKED = "images.tar"


class Official(NamedTuple):
    """A published archive; `digest` is `sha256:<hex>`, `md5:<hex>`, or `None` if none is published."""

    url: str
    digest: str | None


def open_root(root: str, sha256: str | None, raw: Path, cache: Path, progress: bool) -> tuple[Contents, str]:
    """The files at `root`, and a checksum: sha256 of an archive's bytes, or of a folder's paths and sizes.

    The content of `root`, not its name, decides if it is a folder or an archive, and of which kind.

    Args:
        root: path or URL of a folder or archive.
        sha256: expected digest of the archive, or `None`.
        raw: folder to which archives are unpacked. Folders and local tars are read in place.
        cache: folder to which archives at a URL are downloaded.
        progress: if True, shows progress bars.

    Raises:
        DataError: nothing is there, its sha256 is not `sha256`, or `sha256` is given for a folder.
    """
    raw.mkdir(parents=True, exist_ok=True)
    path = Path(users_path(root))
    remote = "://" in root and not root.startswith("file://")
    if remote and "::" in root:
        raise DataError(
            f"{root}: is an address within another one: give that of the archive or folder itself"
        )
    if remote and is_file(root):
        name = posixpath.basename(root.partition("?")[0])[-_LONGEST:]
        path = cache / f"{hashlib.sha256(root.encode()).hexdigest()[:12]}-{name}"
        download(root, path, digest=sha256 and f"sha256:{sha256}", progress=progress)
    elif remote or os.path.isdir(path):
        if sha256 is not None:
            raise DataError(f"{root}: sha256 is of a file, and this is a folder: leave sha256 out")
        contents = list_folder(root if remote else str(path))
        return contents, combined_sha256({name: str(item.size) for name, item in contents.files.items()})
    elif not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise DataError(f"{root}: no such file or folder, or no right to read it")
    found = file_digest(path)
    if sha256 is not None and found != sha256:
        raise DataError(f"{root}: has sha256 {found}, where {sha256} was expected")
    if not remote and kind_of(path) == "tar":
        return list_tar(path, str(path), str(path), raw), found
    return _unpacked(path, raw, _UNPACKED, progress), found


def download_archives(
    archives: Mapping[str, Official], raw: Path, cache: Path, progress: bool
) -> tuple[Contents, str]:
    """The files of official archives, which become plain tars in `raw`, and one sha256 over all archives.

    Raises:
        DataError: an archive cannot be downloaded, has another digest, or is damaged.
    """
    raw.mkdir(parents=True, exist_ok=True)
    files: dict[str, Member] = {}
    folders: set[str] = set()
    unusable: list[tuple[str, str]] = []
    sums = {}
    for name, (url, digest) in archives.items():
        packed = cache / posixpath.basename(url)
        download(url, packed, digest=digest, progress=progress)
        sums[name] = digest or f"sha256:{file_digest(packed)}"
        contents = _unpacked(packed, raw, f"{name}.tar", progress)
        files |= contents.files
        folders |= contents.folders
        unusable += contents.unusable
    return Contents(files, frozenset(folders), tuple(unusable)), combined_sha256(sums)


def _unpacked(path: Path, raw: Path, name: str, progress: bool) -> Contents:
    """Writes an archive as the plain tar `name` to `raw`; returns its contents."""
    if kind_of(path) == "tar":
        with staged(raw / name) as copy:
            shutil.copyfile(path, copy)
    else:
        to_tar(path, raw / name, progress)
    return list_tar(raw / name, name, str(path), raw)
