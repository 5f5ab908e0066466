"""Tars as lists of files with random access."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from pipelines.data.formats.archive import (
    REPLACED,
    SPECIAL,
    Contents,
    Listing,
    Member,
    damage_named,
    in_archive,
)
from pipelines.data.formats.tar_links import Entry, Link, add_entries
from pipelines.data.shards.sample import DataError
from pipelines.storage.files import staged

_LARGEST = 1 << 30  # bytes of a sparse member: a small tar could fill the disk otherwise
_END = bytes(tarfile.BLOCKSIZE)


def list_tar(path: Path, place: str, source: str, raw: Path) -> Contents:
    """The entries of the uncompressed tar at `path`, whose members get `place` as their file.

    Links become the files and folders that they lead to. Sparse members, whose holes are not in the tar, are written to a file
    of their own in `raw`.

    Raises:
        DataError: the file is not a tar or was cut short; the error names `source`.
    """
    found = Listing()
    entries: dict[str, Entry] = {}
    sparse: list[tarfile.TarInfo] = []
    holes = f"{Path(place).stem}.expanded"
    with path.open("rb") as file, damage_named(source, "not a whole tar"):
        end = 0
        for member in _members(file, source):
            name, entry = in_archive(member.name), _entry(member, place, entries)
            if member.issparse() and member.size <= _LARGEST:
                entry = Member(holes, end, member.size)
                end += member.size
                sparse.append(member)
            if (
                name in entries and entry is not entries[name]
            ):  # GNU tar stores what it meets twice as a link to itself
                found.unusable(name, REPLACED)
            entries[name] = entry
        _expand(file, sparse, raw / holes)
    add_entries(entries, found)
    return found.contents()


def _entry(member: tarfile.TarInfo, place: str, entries: Mapping[str, Entry]) -> Entry:
    """What a member is; a hard link is what it leads to among the `entries` before it."""
    if member.isreg() and not member.issparse():
        return Member(place, member.offset_data, member.size)
    if member.islnk():
        target = in_archive(member.linkname)
        return entries.get(target) or Link(target, from_root=True)
    if member.issym():
        return Link(member.linkname)
    return None if member.isdir() else SPECIAL


def _members(file: BinaryIO, source: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, and of the tars that were joined to it (`cat a.tar b.tar`); raises `DataError` if it has no end."""
    start = 0
    while True:
        file.seek(start)
        member = None
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if tar.offset <= member.offset:
                    raise DataError(f"{source}: not a whole tar (a member of negative size): get it again")
                yield member
        if start and member is None:  # what follows the end is no tar
            return
        file.seek(tar.offset)
        while (block := file.read(tarfile.BLOCKSIZE)) == _END:
            start = file.tell()
        if start <= tar.offset:
            raise DataError(f"{source}: the tar has no end: it was cut short; get it again")
        if len(block) < tarfile.BLOCKSIZE:
            return


def _expand(file: BinaryIO, members: Sequence[tarfile.TarInfo], destination: Path) -> None:
    """Writes sparse members of a tar to `destination`, one after the other and with their holes."""
    if not members:
        return
    file.seek(0)
    with (
        tarfile.open(fileobj=file, mode="r:") as tar,
        staged(destination) as unfinished,
        unfinished.open("wb") as output,
    ):
        for member in members:
            content = tar.extractfile(member)
            assert content is not None  # as for every regular file
            shutil.copyfileobj(content, output)
