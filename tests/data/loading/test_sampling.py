"""Samples of a rank and their order."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain

import pytest

from pipelines.data.loading.sampling import batched, epoch_order, rank_batches, rank_share, shuffled, unread
from tests.support.loading import SAMPLING


def test_shuffled_is_a_permutation_that_reaches_as_far_as_its_buffer():
    items = list(range(100))
    for size in (1, 7, 100, 1000):
        order = list(shuffled(items, size, random.Random(0)))
        assert sorted(order) == items
        assert all(item - place < size for place, item in enumerate(order))
    assert list(shuffled(items, 1, random.Random(0))) == items
    assert list(shuffled(items, 100, random.Random(0))) != list(shuffled(items, 100, random.Random(1)))


def test_shuffled_gives_while_it_fills():
    taken = []
    items = (taken.append(item) or item for item in range(10_000))
    first = [item for item, _ in zip(shuffled(items, 1000, random.Random(0)), range(50), strict=False)]
    assert len(taken) < 250  # a tenth of the buffer, and as much again
    assert first != sorted(first)


def test_the_middle_of_shuffled_is_mixed_over_the_whole_buffer():
    order = list(shuffled(range(20_000), 1000, random.Random(0)))
    moved = [item - place for place, item in enumerate(order)][5000:15_000]
    assert max(moved) > 450
    assert min(moved) < -450
    assert all(2000 < sum(low <= move < low + 250 for move in moved) < 3000 for low in (-500, -250, 0, 250))


COUNTS, EACH = [100] * 128, 100  # with a buffer of 1000, one tenth of ImageNet's shards and buffer


def needed(numbers):
    return {number // EACH for number in numbers}


def test_the_first_samples_of_all_ranks_need_few_shards():
    everywhere = set()
    for rank in range(8):
        sampling = replace(SAMPLING, batch_size=32, rank=rank, world_size=8, shuffle_buffer=1000)
        numbers = list(chain.from_iterable(rank_batches(epoch_order(COUNTS, sampling), sampling)))
        assert len(needed(numbers[:8])) <= 3  # two batches of 4
        everywhere |= needed(numbers[:64])  # two batches for each of 8 loader processes
    assert len(everywhere) <= 128 / 4


def test_a_rank_reads_from_as_many_shards_at_a_time_as_its_buffer_spans():
    sampling = replace(SAMPLING, batch_size=10, world_size=2, shuffle_buffer=1000)
    batches = rank_batches(epoch_order(COUNTS, sampling), sampling)
    shards = [[number // EACH for number in batch] for batch in batches]
    first = {shard: place for place, batch in reversed(list(enumerate(shards))) for shard in batch}
    last = {shard: place for place, batch in enumerate(shards) for shard in batch}
    begun = [sum(first[shard] <= place <= last[shard] for shard in first) for place in range(len(shards))]
    assert max(begun) <= 1000 / EACH + 2


def test_batched_keeps_all_in_order():
    assert list(batched(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []


def test_epoch_order_keeps_shards_together_and_differs_by_epoch():
    counts = [3, 4, 2]
    orders = [epoch_order(counts, replace(SAMPLING, epoch=epoch)) for epoch in range(20)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    for order in orders:  # cyclically, the numbers of each shard are consecutive
        steps = sum((b - a) != 1 for a, b in zip(order, [*order[1:], order[0]], strict=True))
        assert steps <= 3
    assert epoch_order(counts, replace(SAMPLING, epoch=5, train=False)) == list(range(9))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13, 50])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_each_batch_of_an_epoch(count, batch_size, world_size):
    sampling = replace(SAMPLING, batch_size=batch_size, world_size=world_size)
    if min(count, batch_size) < world_size:
        with pytest.raises(ValueError, match="cannot feed"):
            rank_share(count, sampling)
        return
    together = min(count, batch_size)
    ranks = [rank_batches(range(count), replace(sampling, rank=rank)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {count // together}
    sizes = [{len(batch) for batch in batches} for batches in ranks]  # equal in all steps
    assert all(len(each) == 1 for each in sizes)
    assert sum(min(each) for each in sizes) == together
    assert {min(each) for each in sizes} <= {together // world_size, -(-together // world_size)}
    places = [place for batches in ranks for batch in batches for place in batch]
    assert sorted(places) == list(range(count // together * together))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_divide_a_split_in_evaluation_in_batches_of_their_own(count, world_size):
    sampling = replace(SAMPLING, batch_size=4, world_size=world_size, train=False)
    ranks = [rank_batches(range(count), replace(sampling, rank=rank)) for rank in range(world_size)]
    assert [place for batches in ranks for batch in batches for place in batch] == list(range(count))
    assert all(len(batch) == 4 for batches in ranks for batch in batches[:-1])


@pytest.mark.parametrize("layouts", [[(3, 1), (1, 9)], [(1, 2), (3, 9)], [(3, 1), (2, 1), (5, 9)]])
def test_ranks_that_do_not_divide_a_batch_share_out_what_others_left(layouts):
    order, sampling, read = (
        epoch_order([20, 30, 21], replace(SAMPLING, batch_size=16)),
        replace(SAMPLING, batch_size=16),
        [],
    )
    for place, (world_size, steps) in enumerate(layouts):
        left = unread(order, layouts[:place], replace(sampling, world_size=world_size))
        ranks = [
            rank_batches(left, replace(sampling, world_size=world_size, rank=rank))[:steps]
            for rank in range(world_size)
        ]
        together = [sum(map(len, batches)) for batches in zip(*ranks, strict=True)]
        assert set(together) == {16}
        read += [number for batches in ranks for batch in batches for number in batch]
    assert len(read) == len(set(read)) == 64


def test_a_rank_in_training_is_shuffled_through_one_buffer():
    sampling = replace(SAMPLING, batch_size=6, rank=1, world_size=2, seed=5, epoch=2, shuffle_buffer=4)
    order = epoch_order([7, 7, 7], sampling)
    expected = list(shuffled(order[9:18], 4, random.Random("buffer/5/2/1")))
    assert rank_batches(order, sampling) == [expected[:3], expected[3:6], expected[6:]]
