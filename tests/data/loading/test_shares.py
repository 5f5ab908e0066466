"""Batches that ranks share unequally, or that `on_error: skip` shortens on some ranks."""

from __future__ import annotations

import pytest

from tests.support.loading import evaluate, keys, write
from tests.support.toy_source import plain

BROKEN = (3, 4, 5)


@pytest.fixture
def broken(tmp_path):
    return write(tmp_path, [plain(i, image=b"no image") if i in BROKEN else plain(i) for i in range(12)])


def ranks_of(root, batch_size, world_size, **options):
    """The batches of each rank in training."""
    return [
        list(evaluate(root, batch_size=batch_size, rank=r, world_size=world_size, train=True, **options))
        for r in range(world_size)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_which_a_rank_has_nothing_left_is_given_empty(broken, workers):
    ranks = ranks_of(broken, 4, 3, on_error="skip", workers=workers, epoch=1)
    assert [len(batches) for batches in ranks] == [3, 3, 3]
    for step in zip(*ranks, strict=True):
        assert sum(len(batch["key"]) + batch["skipped"] for batch in step) == 4
    empty = [batch for batches in ranks for batch in batches if not batch["key"]]
    assert empty  # a rank without images still yields a batch, because the others wait for it
    assert all(batch["skipped"] >= 1 for batch in empty)
    assert sorted(key for batches in ranks for key in keys(batches)) == [
        f"k{i:04d}" for i in range(12) if i not in BROKEN
    ]


def test_shares_of_a_batch_of_64_by_three(tmp_path):
    root = write(tmp_path, [plain(i) for i in range(130)], shard_size=50)
    ranks = ranks_of(root, 64, 3)
    assert [[len(batch["key"]) for batch in batches] for batches in ranks] == [[21, 21], [21, 21], [22, 22]]
    assert len({key for batches in ranks for key in keys(batches)}) == 128
