"""Reads samples from shards by number, still encoded, from a folder or any fsspec URL.

A shard is scanned when its first sample is wanted, and each sample is then one read. Remote shards are copied to this machine
as a whole, see `cache`.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pipelines.data.shards.cache import local_copy
from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.data.shards.tar import Entry, scan

IMAGES = ("jpg", "png", "webp")
SUFFIXES = (*IMAGES, "json", "mask.png")  # nothing else in a shard is ever decoded
OPEN_FILES = 32


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in its shard.

    Attributes:
        key: of the sample.
        shard: the shard's name.
        files: content by suffix: `json`, one of `jpg`, `png` and `webp`, and optionally `mask.png`.
    """

    key: str
    shard: str
    files: dict[str, bytes]


def read_samples(root: str, shards: Sequence[Shard], numbers: Sequence[int], *, verify: bool) -> Iterator[RawSample]:
    """The samples of these numbers, in this order, counted through `shards`.

    Args:
        root: folder or fsspec URL of the shards.
        shards: of one split, in the manifest's order.
        numbers: each in [0, samples of the split).
        verify: check each shard's sha256 before its first sample is read.

    Raises:
        ShardError: a shard is missing, truncated, or not what the manifest says; the error names it.
    """
    starts = [0, *accumulate(shard.count for shard in shards)]
    shard_of = [bisect_right(starts, number) - 1 for number in numbers]
    left = Counter(shard_of)
    scanned: dict[int, tuple[Path, Sequence[Entry]]] = {}
    with _OpenFiles() as files:
        for number, index in zip(numbers, shard_of, strict=True):
            shard = shards[index]
            if index not in scanned:
                path = local_copy(root, shard)
                scanned[index] = (path, _checked_entries(path, shard, verify))
            path, entries = scanned[index]
            try:
                sample = _read(files, path, shard, entries[number - starts[index]])
            except FileNotFoundError:  # removed from the cache to make room
                sample = _read(files, local_copy(root, shard), shard, entries[number - starts[index]])
            yield sample
            left[index] -= 1
            if not left[index]:
                del scanned[index]
                files.close(path)


def _checked_entries(path: Path, shard: Shard, verify: bool) -> tuple[Entry, ...]:
    """The samples in a shard's file, after a check against the manifest."""
    shard.check(path, verify=verify)
    try:
        entries = scan(path, shard.bytes, path.stat().st_mtime_ns, SUFFIXES)
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{shard.name}: not a whole tar: {error}") from None
    if len(entries) != shard.count:
        raise ShardError(f"{shard.name}: {len(entries)} samples; the manifest says {shard.count}")
    for entry in entries:
        suffixes = [suffix for suffix, _, _ in entry.files]
        if "json" not in suffixes or sum(suffix in IMAGES for suffix in suffixes) != 1:
            raise ShardError(f"{shard.name}: {entry.key} has {', '.join(suffixes)}; one image and a json are needed")
    return entries


def _read(files: _OpenFiles, path: Path, shard: Shard, entry: Entry) -> RawSample:
    """One sample, in one read: its files lie side by side."""
    start = min(offset for _, offset, _ in entry.files)
    end = max(offset + size for _, offset, size in entry.files)
    content = files.read(path, start, end - start)
    if len(content) < end - start:
        raise ShardError(f"{shard.name}: truncated while it was read")
    return RawSample(
        entry.key,
        shard.name,
        {suffix: content[offset - start : offset - start + size] for suffix, offset, size in entry.files},
    )


class _OpenFiles:
    """Descriptors of the files last read, at most `OPEN_FILES`."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for path in list(self._open):
            self.close(path)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer at the file's end."""
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self.close(next(iter(self._open)))
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return os.pread(self._open[path], size, offset)

    def close(self, path: Path) -> None:
        """Closes `path` if it is open."""
        if path in self._open:
            os.close(self._open.pop(path))
