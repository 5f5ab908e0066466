"""Folders, tars, tar.gz and zips as lists of files with random access."""

from __future__ import annotations

import gzip
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec

from pipelines.data.shards.sample import DataError
from pipelines.progress import bar
from pipelines.storage.files import staged

_BLOCK = 1 << 20  # bytes
WHOLE_FILE = -1  # the offset of a member that is a file of its own


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive: `size` bytes at `offset` of the file `place`, or the file `place` itself."""

    place: str
    offset: int
    size: int


class Ref(NamedTuple):
    """Where one sample lies: `size` bytes at `offset` of the file `name`.

    The sample is the whole file if `offset` is `WHOLE_FILE`. `path` is the name of an image in its data set, if it has one.
    """

    key: str
    name: str
    offset: int
    size: int
    label: int | None = None
    path: str = ""


@dataclass(frozen=True)
class Contents:
    """The files and folders of an archive by their path in it, with `/` between parts."""

    files: dict[str, Member]
    folders: frozenset[str]


def list_folder(root: str) -> Contents:
    """The files under a folder, local (links are followed) or at any fsspec URL."""
    if "://" in root:
        return _list_remote(root)
    files, folders = {}, set()
    for folder, _, names in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root).as_posix()
        folders.add(inside)
        for name in names:
            path = os.path.join(folder, name)
            files[posixpath.normpath(f"{inside}/{name}")] = Member(path, WHOLE_FILE, os.path.getsize(path))
    return Contents(files, frozenset(folders - {"."}))


def _list_remote(root: str) -> Contents:
    """The files under an fsspec URL."""
    filesystem, base = fsspec.core.url_to_fs(root)
    base = base.rstrip("/")
    files, folders = {}, set()
    for path, info in filesystem.find(base, withdirs=True, detail=True).items():
        inside = path[len(base) :].strip("/")
        if info["type"] == "directory":
            folders.add(inside)
        else:
            files[inside] = Member(filesystem.unstrip_protocol(path), WHOLE_FILE, info["size"])
    return Contents(files, frozenset(folders - {""}))


def list_tar(path: Path, place: str, source: str) -> Contents:
    """The regular files in the uncompressed tar at `path`, whose members get `place` as their file.

    Raises:
        DataError: the file is not a tar or was cut short; the error names `source`.
    """
    files, folders = {}, set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")
                if member.isdir():
                    folders.add(name)
                elif member.isreg():
                    files[name] = Member(place, member.offset_data, member.size)
            file.seek(tar.offset)
            ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise DataError(f"{source}: not a whole tar ({error}): get it again") from None
    if not ended:
        raise DataError(f"{source}: the tar has no end: it was cut short; get it again")
    return Contents(files, frozenset(folders - {"."}))


def is_plain_tar(path: Path) -> bool:
    """Whether the file is an uncompressed tar; raises `DataError` if it is no archive at all."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b" or start == b"PK\x03\x04":
        return False
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        raise DataError(f"{path}: not a tar, tar.gz or zip") from None
    return True


def to_tar(path: Path, destination: Path, progress: bool) -> None:
    """Unpacks a tar.gz, or turns a zip, into one uncompressed tar, atomically.

    Raises:
        DataError: the archive is damaged, cut short or encrypted.
    """
    with path.open("rb") as file:
        unpack = _gunzip if file.read(2) == b"\x1f\x8b" else _zip_to_tar
    with staged(destination) as unpacked, unpacked.open("wb") as output:
        try:
            unpack(path, output, progress)
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError) as error:
            raise DataError(f"{path}: damaged, cut short or encrypted ({error}): get it again") from None


def _gunzip(path: Path, output: BinaryIO, progress: bool) -> None:
    """Writes the content of a gzip file."""
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
    """Writes the entries of a zip as a tar, in their order."""
    with zipfile.ZipFile(path) as archive, tarfile.open(fileobj=output, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        entries = archive.infolist()
        with bar("unpacking", len(entries), show=progress) as shown:
            for entry in entries:
                member = tarfile.TarInfo(entry.filename)
                if entry.is_dir():
                    member.type = tarfile.DIRTYPE
                    tar.addfile(member)
                else:
                    member.size = entry.file_size
                    with archive.open(entry) as content:
                        tar.addfile(member, content)
                shown.update(1)


def read(raw: Path, ref: Ref) -> bytes:
    """The bytes of one member; its place is relative to `raw`, absolute, or an fsspec URL.

    Raises:
        DataError: the file is gone, or the member no longer has the size that was listed.
    """
    start = max(ref.offset, 0)
    try:
        opened = fsspec.open(ref.name, "rb") if "://" in ref.name else (raw / ref.name).open("rb")
        with opened as file:
            file.seek(start)
            content: bytes = file.read(ref.size if ref.offset != WHOLE_FILE else -1)
    except OSError as error:
        raise DataError(f"{ref.name}: cannot be read ({error.strerror or error}); was it moved? run fetch again") from None
    if len(content) != ref.size:
        raise DataError(f"{ref.name}: {len(content)} bytes for {ref.key}, not {ref.size}: it changed; run fetch again")
    return content


def read_file(raw: Path, contents: Contents, path: str, source: str) -> bytes:
    """The bytes of the file `path` of `contents`; raises `DataError`, which names `source`, if it is missing."""
    return read(raw, reference_to(contents, path, path, source))


def reference_to(contents: Contents, path: str, key: str, source: str) -> Ref:
    """A reference, called `key`, to the file `path` of `contents`; raises `DataError` if it is missing."""
    member = contents.files.get(path)
    if member is None:
        raise DataError(f"{source}: {path} is missing")
    return Ref(key, member.place, member.offset, member.size, path=path)


def folder_with(contents: Contents, marker: str, source: str) -> str:
    """The folder of the file `marker`, `""` or ending in `/`: the highest one, then the first by name.

    Raises:
        DataError: there is no such file; the error names the top folders.
    """
    names = [name for name in visible(contents.files) if f"/{name}".endswith(f"/{marker}")]
    if not names:
        top = sorted({name.partition("/")[0] for name in visible(contents.files)})
        raise DataError(f"{source}: {marker} is missing; there is: {', '.join(top[:10]) or 'nothing'}")
    return min((name.removesuffix(marker) for name in names), key=lambda folder: (folder.count("/"), folder))


def visible(names: Iterable[str]) -> Iterator[str]:
    """The names without those that have a part that is hidden or a by-product of an operating system."""
    return (name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
