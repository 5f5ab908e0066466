"""Tars of shards: written by WebDataset's `TarWriter`, deterministic to the byte; and scanned."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.data.shards.manifest import Shard
from pipelines.storage.files import file_digest, staged

SCANNED = 64  # tars of which it is remembered what lies where
BLOCK = 512  # bytes of a header; contents fill whole blocks
EMPTY = bytes(BLOCK)  # ends a tar


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the files of one sample lie in a tar: (suffix, offset, bytes) each."""

    key: str
    files: tuple[tuple[str, int, int], ...]


def write_tar(
    root: str, name: str, samples: Iterable[tuple[str, dict[str, bytes]]]
) -> tuple[Shard, tuple[Entry, ...]]:
    """Writes the shard `name` at `root`, whole or not at all; returns its line of the manifest, and where its samples lie.

    The headers say nothing of when, where and by whom the tar was written.

    Args:
        root: folder or fsspec URL of the shards.
        name: of the tar.
        samples: key, and content by suffix in the order of the tar.

    Raises:
        StorageError: the tar cannot be written.
    """
    from webdataset import TarWriter  # here, because machines that only read shards need not have it

    suffixes: set[str] = set()
    with staged(f"{root}/{name}") as path:
        with (
            path.open("wb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            for key, contents in samples:
                for suffix, content in contents.items():
                    tar.write(
                        {"__key__": key, suffix: content}
                    )  # one file a call: TarWriter sorts those of one call
                suffixes.update(contents)
        entries = scan.__wrapped__(path, 0, 0, tuple(suffixes))  # not remembered: the path is a temporary one
        return Shard(name, path.stat().st_size, file_digest(path), len(entries)), entries


@lru_cache(SCANNED)
def scan(path: Path, size: int, changed: int, suffixes: tuple[str, ...]) -> tuple[Entry, ...]:
    """Where each sample of a tar lies, in order. A sample's files share the name up to the first dot.

    Args:
        path: of the tar.
        size, changed: of the file, bytes and nanoseconds: another content is scanned anew; the same one, epoch after epoch in one
            process, is not.
        suffixes: of the files that are wanted.

    Raises:
        tarfile.TarError, EOFError: the tar is corrupt.
    """
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, offset, bytes_ in members(path):
        key, _, suffix = name.partition(".")
        if suffix in suffixes:
            found.setdefault(key, []).append((suffix, offset, bytes_))
    return tuple(Entry(key, tuple(files)) for key, files in found.items())


def members(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of each file in a tar, in its order; raises as `scan` does."""
    return _plain_members(path) or _members(path)


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of each file in a tar."""
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]


def _plain_members(path: Path) -> list[tuple[str, int, int]]:
    """What `_members` returns, several times faster, of a whole tar of plain headers, as shards are; empty of any other."""
    found: list[tuple[str, int, int]] = []
    offset = 0
    with path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        while (header := os.pread(file.fileno(), BLOCK, offset)) != EMPTY:
            try:
                size, checksum = int(header[124:135], 8), int(header[148:154], 8)
            except ValueError:
                return []
            plain = (header[135:136], header[154:157], header[257:262], header[345:346]) == (
                b"\0",
                b"\0 0",
                b"ustar",
                b"\0",
            )
            if (
                not plain
                or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" ")
                or offset + BLOCK + size > end
            ):
                return []
            name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
            found.append((name, offset + BLOCK, size))
            offset += BLOCK + -(-size // BLOCK) * BLOCK
    return found
