"""Sampling: the samples of each batch of a rank, as a pure function of seed, epoch and rank.

The samples of a split are numbered through its shards. The manifest has the number of samples per shard, so
no shard is opened to shuffle an epoch, to split it among ranks, or to resume it in the middle.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import islice
from operator import itemgetter
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampling:
    """Determines which samples of an epoch a rank reads.

    Attributes:
        batch_size: samples per batch, summed over all ranks in training, per rank in evaluation.
        rank: in [0, world_size).
        world_size: number of ranks that split the epoch.
        train: shuffle, and drop incomplete batches.
        seed: seed of the run.
        epoch: counted from 0.
        shuffle_buffer: in training, a sample moves by fewer places than this within its rank's samples.
    """

    batch_size: int
    rank: int
    world_size: int
    train: bool
    seed: int
    epoch: int
    shuffle_buffer: int


def epoch_order(counts: Sequence[int], sampling: Sampling) -> list[int]:
    """Sample numbers in the order of the epoch: ascending in evaluation, by permuted shards in training.

    In training the order is also rotated by a random offset. Otherwise a split of one shard would drop the
    same samples (its last, incomplete batch) in every epoch. `counts` are the numbers of samples per shard.
    """
    if not sampling.train:
        return list(range(sum(counts)))
    rng = random.Random(f"shards/{sampling.seed}/{sampling.epoch}")
    starts = np.cumsum([0, *counts])
    shards = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=False)]
    rng.shuffle(shards)
    order = np.concatenate(shards) if shards else np.arange(0)
    return np.roll(order, rng.randrange(max(1, len(order)))).tolist()


def shuffled(items: Iterable[Item], buffer_size: int, rng: random.Random) -> Iterator[Item]:
    """Yields `items` in a random order in which each item moves by fewer than `buffer_size` places.

    The buffer yields while it fills, so that the first batches need only the first shards: item i moves by
    fewer than i + `buffer_size` / 10 + 1 places. No item stays in the buffer for long, so that a rank reads
    from few shards at a time.
    """
    buffer: list[tuple[float, int, Item]] = []
    for place, item in enumerate(items):
        reach = min(buffer_size, place + buffer_size // 10 + 1)
        heappush(buffer, (place + rng.random() * reach, place, item))
        while buffer and buffer[0][0] <= place + 1:  # no later item can come before it
            yield heappop(buffer)[2]
    yield from (item for _, _, item in sorted(buffer, key=itemgetter(0, 1)))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields `items` in lists of `size`; the last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def share_of_batch(samples: int, sampling: Sampling) -> range:
    """The rank's places in a batch of `samples` for all ranks; shares differ by at most one sample."""
    rank, world_size = sampling.rank, sampling.world_size
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


def rank_share(count: int, sampling: Sampling) -> range:
    """The rank's places in the epoch's order of `count` samples.

    In training each rank has its share of every full batch, and the rest of the epoch is dropped. A `count`
    below the batch size makes one batch of `count` samples. In evaluation every place belongs to a rank.

    Raises:
        ValueError: in training, a batch or the epoch has fewer samples than there are ranks.
    """
    if not sampling.train:
        return share_of_batch(count, sampling)
    together = min(count, sampling.batch_size)
    if together < sampling.world_size:
        raise ValueError(
            f"{together} training samples cannot feed {sampling.world_size} workers; take fewer workers"
        )
    share, batches = share_of_batch(together, sampling), count // together
    return range(batches * share.start, batches * share.stop)


def rank_batches(order: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """The rank's batches: its share of `order`, shuffled in training, cut into lists of equal length.

    In evaluation the last list may be shorter.

    Raises:
        ValueError: see `rank_share`.
    """
    share, size = rank_share(len(order), sampling), sampling.batch_size
    numbers: Iterable[int] = order[share.start : share.stop]
    if sampling.train:
        size = len(share_of_batch(min(size, len(order)), sampling))
        rng = random.Random(f"buffer/{sampling.seed}/{sampling.epoch}/{sampling.rank}")
        numbers = shuffled(numbers, sampling.shuffle_buffer, rng)
    return list(batched(numbers, size))


def unread(order: Sequence[int], earlier: Iterable[tuple[int, int]], sampling: Sampling) -> Sequence[int]:
    """Removes from `order` the samples that were read before the number of ranks changed.

    Args:
        order: see `epoch_order`.
        earlier: (world size, batches read per rank) of each part of the epoch so far, in order. All parts had
            the batch size of `sampling`.
        sampling: the sampling of any rank that reads the rest.
    """
    for world_size, count in earlier:
        ranks = [
            rank_batches(order, replace(sampling, world_size=world_size, rank=rank))
            for rank in range(world_size)
        ]
        read = {number for batches in ranks for batch in batches[:count] for number in batch}
        order = [number for number in order if number not in read]
    return order
