"""Tars of shards: written by WebDataset's `TarWriter`, deterministic to the byte; and scanned."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.data.shards.manifest import Shard
from pipelines.storage.files import file_digest, staged

SCANNED = 64  # tars of which it is remembered what lies where


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the files of one sample lie in a tar: (suffix, offset, bytes) each."""

    key: str
    files: tuple[tuple[str, int, int], ...]


def write_tar(root: str, name: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Shard:
    """Writes the shard `name` at `root`, whole or not at all; returns its line of the manifest.

    The headers say nothing of when, where and by whom the tar was written.

    Args:
        root: folder or fsspec URL of the shards.
        name: of the tar.
        samples: key, and content by suffix in the order of the tar.

    Raises:
        StorageError: the tar cannot be written.
    """
    from webdataset import TarWriter  # here, because machines that only read shards need not have it

    count = 0
    with staged(f"{root}/{name}") as path:
        with path.open("wb") as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for key, contents in samples:
                for suffix, content in contents.items():
                    tar.write({"__key__": key, suffix: content})  # one file a call: TarWriter sorts those of one call
                count += 1
        return Shard(name, path.stat().st_size, file_digest(path), count)


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
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if member.isfile() and suffix in suffixes:
                found.setdefault(key, []).append((suffix, member.offset_data, member.size))
    return tuple(Entry(key, tuple(files)) for key, files in found.items())
