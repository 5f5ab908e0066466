"""Which samples a rank reads, and in which order."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain

import pytest

from pipelines.data.loading.sampling import batched, epoch_order, rank_batches, rank_share, shuffled
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


COUNTS, EACH = [100] * 128, 100  # with a buffer of 1000 a tenth of ImageNet


def needed(numbers):
    return {number // EACH for number in numbers}


def test_the_first_samples_of_all_ranks_need_few_shards():
    everywhere = set()
    for rank in range(8):
        sampling = replace(SAMPLING, batch_size=32, rank=rank, world_size=8, shuffle_buffer=1000)
        numbers = list(chain.from_iterable(rank_batches(epoch_order(COUNTS, sampling), sampling)))
        assert len(needed(numbers[:8])) <= 3  # two batches of 4
        everywhere |= needed(numbers[:64])  # two batches of each of 8 loader processes
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
    for order in orders:  # going round, each shard's numbers follow one another
        steps = sum((b - a) != 1 for a, b in zip(order, [*order[1:], order[0]], strict=True))
        assert steps <= 3
    assert epoch_order(counts, replace(SAMPLING, epoch=5, train=False)) == list(range(9))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13, 50])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_divide_an_epoch(count, batch_size, world_size):
    for training in (False, True):
        sampling = replace(SAMPLING, batch_size=batch_size, world_size=world_size, train=training)
        if training and count < world_size:
            with pytest.raises(ValueError, match="cannot feed"):
                rank_share(count, sampling)
            continue
        shares = [rank_share(count, replace(sampling, rank=rank)) for rank in range(world_size)]
        places = [place for each in shares for place in each]
        assert places == list(range(len(places)))
        ranks = [rank_batches(range(count), replace(sampling, rank=rank)) for rank in range(world_size)]
        for batches, each in zip(ranks, shares, strict=True):
            assert sorted(place for batch in batches for place in batch) == list(each)
            assert all(len(batch) == batch_size for batch in batches[:-1])
        if not training:
            assert len(places) == count
            continue
        assert {len(batches) for batches in ranks} == {max(1, count // (world_size * batch_size))}
        if count >= world_size * batch_size:
            assert all(len(batch) == batch_size for batches in ranks for batch in batches)


def test_a_rank_in_training_is_shuffled_through_one_buffer():
    sampling = replace(SAMPLING, rank=1, world_size=2, seed=5, epoch=2, shuffle_buffer=4)
    order = epoch_order([7, 7, 7], sampling)
    expected = list(shuffled(order[9:18], 4, random.Random("buffer/5/2/1")))
    assert rank_batches(order, sampling) == [expected[:3], expected[3:6], expected[6:]]
