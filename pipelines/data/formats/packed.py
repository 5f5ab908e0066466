"""Converts packed archives (tar.gz, zip) to uncompressed tars."""

from __future__ import annotations

import gzip
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

from pipelines.data.formats.archive import damage_named
from pipelines.data.shards.sample import DataError
from pipelines.progress import bar
from pipelines.storage.files import staged

_BLOCK = 1 << 20  # bytes
_GZIP = b"\x1f\x8b"
_UNIX = 3  # `ZipInfo.create_system` of entries made on Unix


def kind_of(path: Path) -> Literal["tar", "gzip", "zip"]:
    """The kind of an archive, by its content; raises `DataError` if the file is not an archive."""
    with path.open("rb") as file:
        if file.read(2) == _GZIP:
            return "gzip"
    try:
        tarfile.open(path, "r:").close()
    except Exception:  # tarfile raises errors of any type on other files
        if zipfile.is_zipfile(path):
            return "zip"
        raise DataError(f"{path}: not a tar, tar.gz or zip") from None
    return "tar"


def to_tar(path: Path, destination: Path, progress: bool) -> None:
    """Converts a tar.gz or zip to one uncompressed tar, atomically.

    Raises:
        DataError: the archive is damaged, cut short or encrypted.
    """
    unpack = _gunzip if kind_of(path) == "gzip" else _zip_to_tar
    fault = "damaged, cut short or encrypted"
    with staged(destination) as unpacked, unpacked.open("wb") as output, damage_named(str(path), fault):
        unpack(path, output, progress)


def _gunzip(path: Path, output: BinaryIO, progress: bool) -> None:
    done, size = 0, path.stat().st_size
    with (
        path.open("rb") as packed,
        gzip.open(packed) as content,
        bar("unpacking", size, unit="bytes", show=progress) as shown,
    ):
        while block := content.read(_BLOCK):
            output.write(block)
            shown.update(packed.tell() - done)
            done = packed.tell()


def _zip_to_tar(path: Path, output: BinaryIO, progress: bool) -> None:
    """Writes the entries of a zip as a tar, in the same order."""
    with (
        zipfile.ZipFile(path) as archive,
        tarfile.open(fileobj=output, mode="w:", format=tarfile.PAX_FORMAT) as tar,
    ):
        entries = archive.infolist()
        with bar("unpacking", len(entries), show=progress) as shown:
            for entry in entries:
                _add_entry(archive, entry, tar)
                shown.update(1)


def _add_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, tar: tarfile.TarFile) -> None:
    on_unix = entry.create_system == _UNIX
    member = tarfile.TarInfo(entry.filename if on_unix else entry.filename.replace("\\", "/"))
    if member.name.endswith("/"):
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    elif on_unix and stat.S_ISLNK(entry.external_attr >> 16):
        member.type, member.linkname = tarfile.SYMTYPE, archive.read(entry).decode(errors="surrogateescape")
        tar.addfile(member)
    else:
        member.size = entry.file_size
        with archive.open(entry) as content:
            tar.addfile(member, content)
