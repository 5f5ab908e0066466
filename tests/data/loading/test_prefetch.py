"""Shards are prefetched in the order of the epoch, one ahead of those that may be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.data.loading import prefetch
from pipelines.data.loading.prefetch import Prefetcher, first_needs
from pipelines.data.shards.manifest import Shard, ShardError
from tests.support.flaky import FlakyFileSystem
from tests.support.loading import keys, train, write
from tests.support.toy_source import plain

SHARDS = [Shard(f"train-{number}.tar", 10, "0", 4) for number in range(6)]


def test_each_shard_is_needed_first_by_one_batch() -> None:
    batches = [[8, 9, 0], [1, 2, 20], [21, 3, 8], [12, 4, 13]]
    assert [(batch, SHARDS.index(shard)) for batch, shard in first_needs(SHARDS, batches)] == [
        (0, 2),
        (0, 0),
        (1, 5),
        (3, 3),
        (3, 1),
    ]


@pytest.mark.parametrize(("ahead", "count"), [(0, 2), (2, 3), (4, 4), (90, 6)])
def test_one_shard_comes_beyond_those_that_may_be_read(
    monkeypatch: pytest.MonkeyPatch, ahead: int, count: int
) -> None:
    brought = []

    def local_copy(root: str, shard: Shard, patience: float) -> None:
        assert (root, patience) == ("memory://nothing", 0)
        brought.append(shard)
        if shard is SHARDS[1]:
            raise ShardError("missing")

    monkeypatch.setattr(prefetch, "local_copy", local_copy)
    prefetcher = Prefetcher(
        "memory://nothing", [(place * 2, shard) for place, shard in enumerate(SHARDS)], ahead
    )
    prefetcher.reach(0)
    prefetcher.reach(0)
    prefetcher._asked.put(None)
    prefetcher._thread.join()
    assert brought == SHARDS[:count]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_remote_shards_is_the_pass_over_local_ones(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, asked = [plain(number) for number in range(24)], []
    local, remote = write(tmp_path, samples), write("flaky://bucket/prefetched", samples)
    whole = FlakyFileSystem.get_file

    def get_file(self: Any, source: str, path: str) -> None:
        asked.append(source)
        whole(self, source, path)

    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    assert keys(train(remote, workers=workers)) == keys(train(local))
    assert len(asked) == len(set(asked)) == (0 if workers else 5)  # the loader processes have their own list
