"""A storage that fails for a while only costs time; copies of shards are complete, checked, bounded."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from pipelines.data.loading.loader import loader
from pipelines.data.shards import cache
from pipelines.data.shards.manifest import ShardError, read_manifest
from pipelines.data.shards.publish import publish_shards
from pipelines.data.shards.tar import scan
from pipelines.data.shards.writer import write_shards
from pipelines.params import DataParams
from pipelines.storage import retry
from pipelines.storage.errors import StorageError
from tests.support.flaky import FlakyFileSystem
from tests.support.toy_source import ToySource, plain

COUNT, ROOT = 40, "flaky://bucket/toy"
UNREACHABLE = botocore.exceptions.EndpointConnectionError(endpoint_url="http://storage")


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Shards of 5 samples each at ROOT, without waiting between retries."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    samples = [plain(number) for number in range(COUNT)]
    write_shards(ToySource({"train": samples}), Path("raw"), ROOT, shard_size=5, progress=False)
    yield ROOT
    FlakyFileSystem.troubles = iter(())


def keys(root: str, *, train: bool = False, **data: Any) -> list[str]:
    """The keys of an epoch."""
    batches = loader(root, "train", DataParams(image_size=8, **data), 4, train=train)
    return [key for batch in batches for key in batch["key"]]


def test_a_copy_in_the_cache_is_scanned_once(shards: str) -> None:
    scan.cache_clear()
    assert keys(shards) == keys(shards)
    assert scan.cache_info().misses == scan.cache_info().hits == COUNT // 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_each_sample_once_while_every_fifth_request_fails(shards: str, workers: int) -> None:
    chance = random.Random(1)
    FlakyFileSystem.troubles = (UNREACHABLE if chance.random() < 0.2 else None for _ in itertools.count())
    found = keys(shards, loader_workers=workers, train=True, shuffle_buffer=7)
    assert sorted(found) == sorted(f"k{number:04d}" for number in range(COUNT))


def test_an_outage_of_many_requests_does_not_end_an_epoch(shards: str) -> None:
    FlakyFileSystem.troubles = itertools.chain([None, None], [UNREACHABLE] * 30, itertools.repeat(None))
    assert len(keys(shards)) == COUNT


def test_a_shard_is_brought_once_and_then_read_here(shards: str) -> None:
    first, FlakyFileSystem.asked = keys(shards), 0
    assert keys(shards) == first
    assert FlakyFileSystem.asked == 1  # the manifest


def test_processes_that_want_a_shard_at_the_same_time_download_it_once(
    shards: str, own_shard_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, downloads = read_manifest(shards).shards("train")[0], []
    together, calls = threading.Barrier(4), itertools.count()
    whole, use = FlakyFileSystem.get_file, cache.use

    def get_file(self: FlakyFileSystem, remote: str, path: str) -> None:
        downloads.append(path)
        whole(self, remote, path)

    def use_together(path: Path, shard: Any) -> bool:
        found = use(path, shard)
        if next(calls) < 4:  # all find no copy before any of them downloads
            together.wait()
        return found

    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    monkeypatch.setattr(cache, "use", use_together)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: cache.local_copy(shards, shard), range(4)))
    assert len(downloads) == 1
    assert {path.stat().st_size for path in paths} == {shard.bytes}
    assert [path.name for path in own_shard_cache.iterdir()] == [f"{shard.sha256}.tar"]


def test_a_copy_that_a_crash_has_cut_is_brought_again(shards: str, own_shard_cache: Path) -> None:
    shard = read_manifest(shards).shards("train")[0]
    copy = cache.local_copy(shards, shard)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:100])
    assert cache.local_copy(shards, shard).read_bytes() == whole


def test_the_cache_has_its_bound_and_lets_the_longest_unused_go(
    shards: str, own_shard_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(shard.bytes for shard in read_manifest(shards).shards("train"))
    monkeypatch.setenv("SHARD_CACHE_GB", str(3.5 * size / 1e9))
    of_train = read_manifest(shards).shards("train")
    for shard in (*of_train[:3], of_train[0], of_train[3]):
        path = cache.local_copy(shards, shard)
        assert path.stat().st_size == shard.bytes
    kept = {path.stem for path in own_shard_cache.iterdir()}
    assert kept == {of_train[place].sha256 for place in (2, 0, 3)}
    mixed = keys(
        shards, train=True, shuffle_buffer=COUNT
    )  # needs all shards at once, more than the cache has room for
    assert sorted(mixed) == sorted(keys(shards))
    assert sum(path.stat().st_size for path in own_shard_cache.iterdir()) <= 3.5 * size


def test_what_a_killed_download_left_goes_when_there_is_no_room(
    shards: str, own_shard_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = read_manifest(shards).shards("train")[0]
    monkeypatch.setenv("SHARD_CACHE_GB", str(1.5 * shard.bytes / 1e9))
    for name, age in (("old", 2 * cache.ABANDONED), ("new", 0.0)):
        path = own_shard_cache / f"{name}.partial"
        path.write_bytes(bytes(shard.bytes // 4 if name == "new" else shard.bytes))
        os.utime(path, (time.time() - age,) * 2)
    cache.local_copy(shards, shard)
    assert {path.name for path in own_shard_cache.iterdir()} == {"new.partial", f"{shard.sha256}.tar"}


def test_a_copy_that_comes_damaged_is_brought_again_and_one_that_stays_so_is_named(
    shards: str, own_shard_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = read_manifest(shards).shards("train")[0]
    whole, cut = FlakyFileSystem.get_file, [True, False]

    def get_file(self: FlakyFileSystem, remote: str, path: str) -> None:
        whole(self, remote, path)
        if cut.pop(0):
            Path(path).write_bytes(Path(path).read_bytes()[:-1])

    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    assert cache.local_copy(shards, shard).stat().st_size == shard.bytes
    cut[:] = [True] * 9
    other = read_manifest(shards).shards("train")[1]
    with pytest.raises(
        ShardError, match=rf"{other.name}: truncated: \d+ bytes; the manifest says {other.bytes}"
    ):
        cache.local_copy(shards, other)
    assert [path.stem for path in own_shard_cache.iterdir()] == [shard.sha256]


def test_shards_are_published_once_by_their_content_and_found_without_those_here(
    shards: str, tmp_path: Path
) -> None:
    write_shards(
        ToySource({"train": [plain(0), plain(1)]}), Path("raw"), tmp_path, shard_size=1, progress=False
    )
    FlakyFileSystem.troubles = itertools.chain([UNREACHABLE, None, UNREACHABLE], itertools.repeat(None))
    url = publish_shards(str(tmp_path), "flaky://bucket/published")
    assert read_manifest(url) == read_manifest(str(tmp_path))
    assert keys(url) == keys(str(tmp_path))
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    assert publish_shards(str(tmp_path), "flaky://bucket/published") == url
    with pytest.raises(StorageError, match=r"cannot be put to flaky://bucket/elsewhere"):
        publish_shards(str(tmp_path), "flaky://bucket/elsewhere")
