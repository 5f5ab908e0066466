"""Reads encoded samples by their numbers from shards in a folder or at any fsspec URL.

Remote shards are copied to this machine whole, see `cache`. A shard is scanned before its first sample is
read. Each sample then takes one read. If the cache has no room for a shard, each of its samples is read from
the storage by one range request.
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
SUFFIXES = (*IMAGES, "json", "mask.png")  # other files in a shard are never decoded
OPEN_FILES = 32


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as its shard stores it.

    Attributes:
        key: key of the sample.
        shard: name of its shard.
        files: suffix -> content: `json`, one of `jpg`, `png` and `webp`, and optionally `mask.png`.
        last: True if this process reads no further sample of the shard in this pass.
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
    """Yields the samples `numbers` in this order. Samples are numbered through `shards`, from 0.

    Args:
        root: folder or fsspec URL of the manifest.
        shards: all shards of one split, in the manifest's order.
        numbers: each in [0, number of samples in the split).
        verify: check each shard's sha256 before its first sample is read.
        split: name of the split; only needed for tars that are read in place.
        tars: see `Manifest`.

    Raises:
        ShardError: a shard is missing, truncated, or does not match the manifest. The error names it.
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
    """Raises `ShardError` unless there are `shard.count` samples, each with one image and a json."""
    if len(entries) != shard.count:
        raise ShardError(f"{shard.name}: {len(entries)} samples; the manifest says {shard.count}")
    for entry in entries:
        suffixes = [suffix for suffix, _, _ in entry.files]
        if not {"json", CAPTION} & set(suffixes) or sum(suffix in IMAGES for suffix in suffixes) != 1:
            raise ShardError(
                f"{shard.name}: {entry.key} has {', '.join(suffixes)}; one image and a json are needed"
            )


class OpenShards:
    """Reads the shards at `root` and holds up to `OPEN_FILES` of them open. The cache keeps open copies.

    Args:
        root: folder or fsspec URL of the shards.
        suffixes: suffixes of the files to read.
        indexed: returns the places of a shard's samples from the index.
        check: raises `ShardError` if these entries cannot be the samples of a shard.
        verify: check the sha256 of each shard.
        patient: wait for room in the cache while no shard is open, until one wait fails.
        scanned: find the samples of a shard by scanning its local file. If False, or if there is no local
            file, `indexed` gives their places.
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
        # Descriptors of local files by shard name, the most recently used one at the end.
        self._open: OrderedDict[str, int] = OrderedDict()
        # Shards that are read from the storage because the cache has no room for them.
        self._direct: set[str] = set()

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entries(self, shard: Shard) -> tuple[Entry, ...]:
        """Places of a shard's samples in its tar. Opens the shard if needed."""
        if shard.name not in self._entries:
            self._begin(shard)
        return self._entries[shard.name]

    def read(self, shard: Shard, entry: Entry) -> dict[str, bytes]:
        """Reads the files of one sample (adjacent in the tar) at once; returns suffix -> content."""
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
        """Closes the shard `name`, by default all shards. The cache may then delete their copies."""
        for each in {*self._open, *self._entries} if name is None else [name]:
            if each in self._open:
                os.close(self._open.pop(each))
            self._entries.pop(each, None)
            self._direct.discard(each)

    def _begin(self, shard: Shard) -> None:
        """Opens the shard, checks it against the manifest, and finds the places of its samples."""
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
        """Places by the index, which is read once per pass even if the shard is opened several times."""
        return self._entries.get(shard.name) or self._indexed(shard)

    def _scan(self, shard: Shard, path: Path, descriptor: int) -> tuple[Entry, ...]:
        """Places by a scan of the shard's local file."""
        try:
            return scan(path, shard.bytes, os.fstat(descriptor).st_mtime_ns, self._suffixes)
        except (tarfile.TarError, EOFError) as error:
            raise ShardError(f"{shard.name}: not a whole tar: {error}") from None
