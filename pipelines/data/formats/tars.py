"""Lists the files of uncompressed tars with their offsets, for random access."""

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

_LARGEST = 1 << 30  # most bytes of a sparse member: otherwise a small tar could fill the disk
_END = bytes(tarfile.BLOCKSIZE)


def list_tar(path: Path, place: str, source: str, raw: Path) -> Contents:
    """The entries of the uncompressed tar at `path`.

    Links become the files and folders that they lead to. Sparse members are not contiguous in the tar, as it
    omits their holes. So they are written, with their holes, to the file `<stem of place>.expanded` in `raw`.

    Args:
        path: the tar.
        place: name of the tar in the listed members.
        source: name of the tar in errors.
        raw: folder for sparse members.

    Raises:
        DataError: the file is not a tar or was cut short.
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
            # GNU tar stores a file that it is given twice as a hard link to itself, which replaces nothing.
            if name in entries and entry is not entries[name]:
                found.unusable(name, REPLACED)
            entries[name] = entry
        _expand(file, sparse, raw / holes)
    add_entries(entries, found)
    return found.contents()


def _entry(member: tarfile.TarInfo, place: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry of a tar member; a hard link to one of the earlier `entries` becomes that entry."""
    if member.isreg() and not member.issparse():
        return Member(place, member.offset_data, member.size)
    if member.islnk():
        target = in_archive(member.linkname)
        return entries.get(target) or Link(target, from_root=True)
    if member.issym():
        return Link(member.linkname)
    return None if member.isdir() else SPECIAL


def _members(file: BinaryIO, source: str) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar and of the tars appended to it (`cat a.tar b.tar`).

    Raises:
        DataError: a tar has no end-of-archive block, or a member of negative size.
    """
    start = 0
    while True:
        file.seek(start)
        member = None
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if tar.offset <= member.offset:
                    raise DataError(f"{source}: not a whole tar (a member of negative size): get it again")
                yield member
        if start and member is None:  # the bytes after the end are not a tar
            return
        file.seek(tar.offset)
        while (block := file.read(tarfile.BLOCKSIZE)) == _END:
            start = file.tell()
        if start <= tar.offset:
            raise DataError(f"{source}: the tar has no end: it was cut short; get it again")
        if len(block) < tarfile.BLOCKSIZE:
            return


def _expand(file: BinaryIO, members: Sequence[tarfile.TarInfo], destination: Path) -> None:
    """Writes sparse members of a tar to `destination`, one after the other, with zeros in their holes."""
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
            assert content is not None  # sparse members are regular files
            shutil.copyfileobj(content, output)
