"""The files of a data set, below the user's root or in its official archives."""

from __future__ import annotations

import hashlib
import posixpath
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents
from pipelines.data.formats.download import download
from pipelines.data.shards.sample import DataError
from pipelines.storage.files import combined_sha256, file_digest, staged
from pipelines.storage.paths import users_path

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_UNPACKED = "images.tar"


class Official(NamedTuple):
    """A published archive; `digest` is `sha256:<hex>`, `md5:<hex>`, or None if none is published."""

    url: str
    digest: str | None


def open_root(root: str, sha256: str | None, raw: Path, cache: Path, progress: bool) -> tuple[Contents, str]:
    """The files at `root`, and the sha256 of an archive's bytes or of a folder's sorted paths and sizes.

    Raises:
        DataError: nothing is there, or its sha256 is not `sha256`.
    """
    raw.mkdir(parents=True, exist_ok=True)
    path = Path(users_path(root))
    remote = "://" in root and not root.startswith("file://")
    if remote and root.endswith(_ARCHIVES):
        path = cache / f"{hashlib.sha256(root.encode()).hexdigest()[:12]}-{posixpath.basename(root)}"
        download(root, path, digest=sha256 and f"sha256:{sha256}", progress=progress)
    elif remote or path.is_dir():
        if sha256 is not None:
            raise DataError(f"{root}: sha256 is of a file, and this is a folder: leave sha256 out")
        contents = archive.list_folder(root if remote else str(path))
        return contents, combined_sha256({name: str(item.size) for name, item in contents.files.items()})
    elif not path.is_file():
        raise DataError(f"{root}: no such file or folder")
    found = file_digest(path)
    if sha256 is not None and found != sha256:
        raise DataError(f"{root}: has sha256 {found}, where {sha256} was expected")
    if not remote and archive.is_plain_tar(path):
        return archive.list_tar(path, str(path), str(path)), found
    return _unpacked(path, raw, _UNPACKED, progress), found


def download_archives(archives: Mapping[str, Official], raw: Path, cache: Path, progress: bool) -> tuple[Contents, str]:
    """The files of official archives, which become plain tars in `raw`, and one sha256 of all archives.

    Raises:
        DataError: an archive cannot be downloaded, has another digest, or is damaged.
    """
    raw.mkdir(parents=True, exist_ok=True)
    files: dict[str, archive.Member] = {}
    folders: set[str] = set()
    sums = {}
    for name, (url, digest) in archives.items():
        packed = cache / posixpath.basename(url)
        download(url, packed, digest=digest, progress=progress)
        sums[name] = digest or f"sha256:{file_digest(packed)}"
        contents = _unpacked(packed, raw, f"{name}.tar", progress)
        files |= contents.files
        folders |= contents.folders
    return Contents(files, frozenset(folders)), combined_sha256(sums)


def _unpacked(path: Path, raw: Path, name: str, progress: bool) -> Contents:
    """Turns an archive into the plain tar `name` in `raw`; returns its contents."""
    if archive.is_plain_tar(path):
        with staged(raw / name) as copy:
            shutil.copyfile(path, copy)
    else:
        archive.to_tar(path, raw / name, progress)
    return archive.list_tar(raw / name, name, str(path))
