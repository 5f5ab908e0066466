"""The cache keeps its bound: room is reserved, open copies stay, and readers go on without room."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pytest

from pipelines.data.shards import cache
from pipelines.data.shards.cache import NoRoomError, open_copy
from pipelines.data.shards.manifest import Shard, ShardError, read_manifest
from pipelines.data.shards.reader import read_samples
from pipelines.data.shards.writer import write_shards
from tests.support.flaky import FlakyFileSystem
from tests.support.toy_source import ToySource, plain

COUNT, EACH, ROOT = 32, 4, "flaky://bucket/bounded"


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> tuple[Shard, ...]:
    """Eight remote shards of one size."""
    monkeypatch.setattr(cache, "PATIENCE", 0.0)
    source = ToySource({"train": [plain(number) for number in range(COUNT)]})
    write_shards(source, Path("raw"), ROOT, shard_size=EACH, progress=False)
    found = read_manifest(ROOT).shards("train")
    assert len({shard.bytes for shard in found}) == 1
    return found


@pytest.fixture
def bound(shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch) -> Callable[[float], int]:
    def set_bound(count: float) -> int:
        """Limits the cache to `count` shards; returns the limit in bytes."""
        monkeypatch.setenv("SHARD_CACHE_GB", str(count * shards[0].bytes / 1e9))
        return cache.cache_limit()

    return set_bound


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were downloaded, in order."""
    found, whole = [], FlakyFileSystem.get_file

    def get_file(self: FlakyFileSystem, remote: str, path: str) -> None:
        found.append(remote.rpartition("/")[2])
        whole(self, remote, path)

    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    return found


def on_disk(folder: Path) -> int:
    """Bytes on disk of the cache's files, including deleted files that this process has open."""
    taken = {}
    for place in (*folder.iterdir(), *Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):
            status, name = place.stat(), os.readlink(place) if place.is_symlink() else str(place)
            # Between the two calls, another thread may reuse the descriptor for another file or a folder.
            # Lock files are sparse.
            if (
                S_ISREG(status.st_mode)
                and name.startswith(f"{folder}/")
                and not name.removesuffix(" (deleted)").endswith(".lock")
            ):
                taken[status.st_ino] = status.st_size
    return sum(taken.values())


def read(shards: tuple[Shard, ...], numbers: Any = range(COUNT)) -> list[str]:
    return [sample.key for sample in read_samples(ROOT, shards, numbers, verify=False)]


def test_readers_of_all_shards_at_once_stay_below_the_bound(
    shards: tuple[Shard, ...], bound: Any, own_shard_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, most, whole = bound(2), [0], FlakyFileSystem.get_file

    def get_file(self: FlakyFileSystem, remote: str, path: str) -> None:
        whole(self, remote, path)
        most.append(on_disk(own_shard_cache))

    def read_all(reader: int) -> list[str]:
        found = []
        for sample in read_samples(
            ROOT, shards, [(number * 5 + reader) % COUNT for number in range(COUNT)], verify=False
        ):
            found.append(sample.key)  # four shards are in use at a time
            most.append(on_disk(own_shard_cache))
        return found

    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_all, range(8)))
    assert all(sorted(keys) == [f"k{number:04d}" for number in range(COUNT)] for keys in found)
    assert 0 < max(most) <= limit
    assert not list(own_shard_cache.glob("*.lock")) + list(own_shard_cache.glob("*.partial"))


def test_readers_of_the_same_shards_download_each_once(
    shards: tuple[Shard, ...], bound: Any, downloads: list[str]
) -> None:
    bound(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read(shards), range(8)))
    assert Counter(downloads) == Counter(shard.name for shard in shards)


def test_what_is_open_is_not_deleted_and_samples_without_room_are_read_one_by_one(
    shards: tuple[Shard, ...], bound: Any, downloads: list[str], own_shard_cache: Path
) -> None:
    bound(2)
    held = [open_copy(ROOT, shard) for shard in shards[:2]]
    assert read(shards) == [f"k{number:04d}" for number in range(COUNT)]
    assert downloads == [shard.name for shard in shards[:2]]
    assert {path.stem for path in own_shard_cache.iterdir()} == {shard.sha256 for shard in shards[:2]}
    with pytest.raises(NoRoomError, match=r"^train-000002.tar: no room [^\n]*SHARD_CACHE_GB[^\n]*$"):
        open_copy(ROOT, shards[2])
    os.close(held[0].descriptor)
    read(shards, range(2 * EACH, 3 * EACH))
    assert {path.stem for path in own_shard_cache.iterdir()} == {shards[1].sha256, shards[2].sha256}
    os.close(held[1].descriptor)


def test_a_pass_that_needs_more_shards_at_a_time_than_there_is_room_for_fetches_nothing_twice(
    shards: tuple[Shard, ...], bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(3)
    fetched, cat_file, get_file = [], FlakyFileSystem.cat_file, FlakyFileSystem.get_file

    def counted_cat(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        fetched.extend([end - start] if path.endswith(".tar") else [])
        return cat_file(self, path, start, end, **more)

    def counted_get(self: Any, remote: str, path: str) -> None:
        fetched.append(shards[0].bytes)
        get_file(self, remote, path)

    monkeypatch.setattr(FlakyFileSystem, "cat_file", counted_cat)
    monkeypatch.setattr(FlakyFileSystem, "get_file", counted_get)
    mixed = [place * EACH + turn for turn in range(EACH) for place in range(len(shards))]
    assert sorted(read(shards, mixed)) == [f"k{number:04d}" for number in range(COUNT)]
    assert sum(fetched) <= sum(shard.bytes for shard in shards)


def test_room_is_reserved_before_a_download_begins(
    shards: tuple[Shard, ...], bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(1.5)
    begun, go_on, whole = threading.Event(), threading.Event(), FlakyFileSystem.get_file

    def get_file(self: FlakyFileSystem, remote: str, path: str) -> None:
        begun.set()  # nothing is written yet
        go_on.wait(10)
        whole(self, remote, path)

    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.local_copy, ROOT, shards[0])
        begun.wait(10)
        with pytest.raises(NoRoomError):
            open_copy(ROOT, shards[1])
        go_on.set()
        assert first.result().stat().st_size == shards[0].bytes
    assert cache.local_copy(ROOT, shards[1]).exists()


def test_a_patient_reader_gets_the_room_that_another_gives_up(
    shards: tuple[Shard, ...], bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(1)
    held = open_copy(ROOT, shards[0])
    monkeypatch.setattr(
        cache.time, "sleep", lambda seconds: os.close(held.descriptor)
    )  # while the reader waits
    copy = open_copy(ROOT, shards[1], patience=60)
    assert os.fstat(copy.descriptor).st_size == shards[1].bytes
    os.close(copy.descriptor)


def test_what_a_killed_download_has_reserved_is_given_back(
    shards: tuple[Shard, ...], bound: Any, own_shard_cache: Path
) -> None:
    bound(1)
    for name in ("killed", shards[0].sha256):
        (own_shard_cache / f"{name}.partial").write_bytes(bytes(100))
        with (own_shard_cache / f"{name}.lock").open("wb") as file:
            os.ftruncate(file.fileno(), shards[0].bytes)
    cache.local_copy(ROOT, shards[0])
    assert [path.name for path in own_shard_cache.iterdir()] == [f"{shards[0].sha256}.tar"]


def test_a_shard_larger_than_the_cache_is_read_sample_by_sample(
    shards: tuple[Shard, ...], bound: Any, downloads: list[str], own_shard_cache: Path
) -> None:
    bound(1)
    kept = cache.local_copy(ROOT, shards[0])
    bound(0.9)
    assert read(shards, [9, 8]) == ["k0009", "k0008"]
    assert downloads == [shards[0].name]
    assert kept.exists()  # deleting it would not have made enough room


def test_shards_without_an_index_and_without_room_are_one_line(
    shards: tuple[Shard, ...], bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(read_manifest(ROOT), indexes={})
    monkeypatch.setattr("pipelines.data.shards.index.read_manifest", lambda root: without)
    bound(0.5)
    with pytest.raises(ShardError, match=r"^[^\n]*no index of train[^\n]*run the stage `shard` again$"):
        read(shards)


@pytest.fixture(autouse=True)
def nothing_stays_open(own_shard_cache: Path) -> Iterator[None]:
    yield
    for place in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            assert not os.readlink(place).startswith(f"{own_shard_cache}/")
