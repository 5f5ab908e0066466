"""Reads samples from shards by number, still encoded, from a folder or any fsspec URL.

Remote shards are copied to this machine as a whole, see `cache`. A copy is scanned when its first sample is wanted, and each
sample is then one read. If the cache has no room for a shard, its samples are read from the storage one by one.
"""

from __future__ import annotations

import logging
import os
import tarfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from pipelines.data.formats.img2dataset import CAPTION, annotation_of
from pipelines.data.shards.cache import NoRoomError, open_copy
from pipelines.data.shards.index import read_entries
from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.data.shards.tar import Entry, scan
from pipelines.storage import files

log = logging.getLogger(__name__)
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
        last: no sample of the shard follows in this pass of this process.
    """

    key: str
    shard: str
    files: dict[str, bytes]
    last: bool


def read_samples(
    root: str,
    shards: Sequence[Shard],
    numbers: Sequence[int],
    *,
    verify: bool,
    split: str | None = None,
    tars: str | None = None,
) -> Generator[RawSample, None, None]:
    """The samples of these numbers, in this order, counted through `shards`.

    Args:
        root: folder or fsspec URL of the manifest.
        shards: of one split, in the manifest's order.
        numbers: each in [0, samples of the split).
        verify: check each shard's sha256 before its first sample is read.
        split: the name of that split; only tars that are read in place need it.
        tars: see `Manifest`.

    Raises:
        ShardError: a shard is missing, truncated, or not what the manifest says; the error names it.
    """
    starts = [0, *accumulate(shard.count for shard in shards)]
    shard_of = [bisect_right(starts, number) - 1 for number in numbers]
    left = Counter(shard_of)
    indexed, place = partial(read_entries, root, split=split), root if tars is None else tars
    with OpenShards(place, SUFFIXES, indexed, check_entries, verify=verify, scanned=tars is None) as opened:
        for number, index in zip(numbers, shard_of, strict=True):
            shard = shards[index]
            entry = opened.entries(shard)[number - starts[index]]
            content = opened.read(shard, entry)
            if "json" not in content:
                content["json"] = annotation_of(content.pop(CAPTION))
            left[index] -= 1
            if not left[index]:
                opened.close(shard.name)
            yield RawSample(entry.key, shard.name, content, last=not left[index])


def check_entries(shard: Shard, entries: Sequence[Entry]) -> None:
    """Raises `ShardError` unless these are the samples of `shard`."""
    if len(entries) != shard.count:
        raise ShardError(f"{shard.name}: {len(entries)} samples; the manifest says {shard.count}")
    for entry in entries:
        suffixes = [suffix for suffix, _, _ in entry.files]
        if not {"json", CAPTION} & set(suffixes) or sum(suffix in IMAGES for suffix in suffixes) != 1:
            raise ShardError(
                f"{shard.name}: {entry.key} has {', '.join(suffixes)}; one image and a json are needed"
            )


class OpenShards:
    """The shards at `root` that are being read, at most `OPEN_FILES` at a time; a copy that is open stays in the cache.

    Args:
        root: folder or fsspec URL of the shards.
        suffixes: of the files that are read.
        indexed: returns from the index where the samples of a shard lie.
        check: raises `ShardError` if these cannot be the samples of a shard.
        verify: check the sha256 of each shard.
        scanned: whether a shard is scanned for its samples where it is at hand; otherwise `indexed` alone says where they lie.
        patient: wait for room in the cache, if nothing is open; until that was once in vain.
    """

    def __init__(
        self,
        root: str,
        suffixes: tuple[str, ...],
        indexed: Callable[[Shard], tuple[Entry, ...]],
        check: Callable[[Shard, Sequence[Entry]], None] = lambda shard, entries: None,
        verify: bool = False,
        patient: bool = True,
        scanned: bool = True,
    ) -> None:
        self._root, self._suffixes, self._indexed, self._check = root, suffixes, indexed, check
        self._verify, self._patient, self._scanned, self._told = verify, patient, scanned, False
        self._entries: dict[str, tuple[Entry, ...]] = {}
        self._open: OrderedDict[str, int] = (
            OrderedDict()
        )  # descriptors of local files, the one used last at the end
        self._direct: set[str] = (
            set()
        )  # shards that are read from the storage, because the cache has no room for them

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entries(self, shard: Shard) -> tuple[Entry, ...]:
        """Where the samples of a shard lie."""
        if shard.name not in self._entries:
            self._begin(shard)
        return self._entries[shard.name]

    def read(self, shard: Shard, entry: Entry) -> dict[str, bytes]:
        """The files of one sample by suffix, in one read: they lie side by side."""
        if shard.name not in self._open and shard.name not in self._direct:
            self._begin(shard)
        start = min(offset for _, offset, _ in entry.files)
        end = max(offset + size for _, offset, size in entry.files)
        if shard.name in self._direct:
            try:
                content = files.read(f"{self._root}/{shard.name}", start, end)
            except OSError as error:
                raise ShardError(f"{shard.name}: not read from {self._root}: {error}") from None
        else:
            self._open.move_to_end(shard.name)
            content = os.pread(self._open[shard.name], end - start, start)
        if len(content) != end - start:
            raise ShardError(f"{shard.name}: {len(content)} bytes of {end - start} were read at {start}")
        return {
            suffix: content[offset - start : offset - start + size] for suffix, offset, size in entry.files
        }

    def close(self, name: str | None = None) -> None:
        """Ends the reading of a shard, or of all; their copies may be deleted from the cache."""
        for each in {*self._open, *self._entries} if name is None else [name]:
            if each in self._open:
                os.close(self._open.pop(each))
            self._entries.pop(each, None)
            self._direct.discard(each)

    def _begin(self, shard: Shard) -> None:
        """Opens the shard and learns where its samples lie; after a check against the manifest."""
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            path, descriptor = open_copy(self._root, shard, None if self._patient and not self._open else 0.0)
        except NoRoomError as error:
            if not self._told:
                log.warning("%s; samples are read one by one meanwhile", error)
            self._told, self._patient = True, False
            self._direct.add(shard.name)
            entries = self._known(shard)
        else:
            self._open[shard.name] = descriptor
            shard.check(path, verify=self._verify)
            entries = self._scan(shard, path, descriptor) if self._scanned else self._known(shard)
        self._check(shard, entries)
        self._entries[shard.name] = entries

    def _known(self, shard: Shard) -> tuple[Entry, ...]:
        """Where the samples lie by the index, which is read once in a pass although a shard may be opened several times."""
        return self._entries.get(shard.name) or self._indexed(shard)

    def _scan(self, shard: Shard, path: Path, descriptor: int) -> tuple[Entry, ...]:
        """Where the samples lie by the shard itself."""
        try:
            return scan(path, shard.bytes, os.fstat(descriptor).st_mtime_ns, self._suffixes)
        except (tarfile.TarError, EOFError) as error:
            raise ShardError(f"{shard.name}: not a whole tar: {error}") from None
