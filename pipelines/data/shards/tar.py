"""Writes tars with WebDataset's `TarWriter`, deterministic to the byte, and finds the samples in them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.data.shards.manifest import Shard
from pipelines.storage.files import file_digest, staged

SCANNED = 64  # tars whose entries `scan` remembers
BLOCK = 512  # bytes of a header; contents are padded to whole blocks
EMPTY = bytes(BLOCK)  # the block that ends a tar


@dataclass(frozen=True, slots=True)
class Entry:
    """Places of one sample's files in a tar: (suffix, offset, bytes) per file."""

    key: str
    files: tuple[tuple[str, int, int], ...]


def write_tar(
    root: str, name: str, samples: Iterable[tuple[str, dict[str, bytes]]]
) -> tuple[Shard, tuple[Entry, ...]]:
    """Writes the shard `name` to `root` atomically; returns its manifest entry and its samples' places.

    The tar headers contain no time, host or user, so that equal samples give equal bytes.

    Args:
        root: folder or fsspec URL of the shards.
        name: name of the tar.
        samples: pairs (key, suffix -> content), in the order of the tar.

    Raises:
        StorageError: the tar cannot be written.
    """
    from webdataset import TarWriter  # imported here because machines that only read shards do not need it

    suffixes: set[str] = set()
    with staged(f"{root}/{name}") as path:
        with (
            path.open("wb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            for key, contents in samples:
                for suffix, content in contents.items():
                    # One file per call, because TarWriter sorts the files of one call by suffix.
                    tar.write({"__key__": key, suffix: content})
                suffixes.update(contents)
        entries = scan.__wrapped__(path, 0, 0, tuple(suffixes))  # uncached because `path` is temporary
        return Shard(name, path.stat().st_size, file_digest(path), len(entries)), entries


@lru_cache(SCANNED)
def scan(path: Path, size: int, changed: int, suffixes: tuple[str, ...]) -> tuple[Entry, ...]:
    """Places of all samples in a tar, in order. A sample's files share their name up to the first dot.

    Args:
        path: path of the tar.
        size, changed: size in bytes and modification time in nanoseconds of the file. They are part of the
            cache key, so that an unchanged tar is scanned once per process and a changed one again.
        suffixes: suffixes of the wanted files.

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
    """Name, offset and bytes of each file in a tar, in order. Raises as `scan` does."""
    return _plain_members(path) or _members(path)


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Implements `members` by `tarfile`, for any tar."""
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]


def _plain_members(path: Path) -> list[tuple[str, int, int]]:
    """Implements `members` several times faster for complete tars of plain ustar headers, as shards are.

    Returns an empty list for any other tar.
    """
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
