"""Which samples a rank reads in an epoch, in which batches: a pure function of seed, epoch and rank.

The samples of a split are numbered through its shards. Because the manifest has the counts, no shard is opened to shuffle an
epoch, to divide it among ranks, or to resume it in the middle.
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
    """How the samples of an epoch are dealt to a rank.

    Attributes:
        batch_size: samples per batch: in training of all ranks together, in evaluation of each rank.
        rank: in [0, world_size).
        world_size: number of ranks that share the epoch.
        train: shuffle, and drop incomplete batches.
        seed: of the run.
        epoch: counted from 0.
        shuffle_buffer: places by which shuffling moves a sample at most, in training.
    """

    batch_size: int
    rank: int
    world_size: int
    train: bool
    seed: int
    epoch: int
    shuffle_buffer: int


def epoch_order(counts: Sequence[int], sampling: Sampling) -> list[int]:
    """Numbers of all samples in the order of the epoch: ascending, or in training shard by shard in a permuted order.

    In training the order also starts at another sample each epoch (and wraps around): otherwise a single shard would lose the
    same samples, those of the last, incomplete batch, each time. `counts` are the samples of each shard.
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
    """`items` in another order: each moves by fewer than `buffer_size` places.

    The buffer gives while it fills, so that the first batches need the first items alone: item i moves by fewer than
    i + `buffer_size` / 10 + 1 places. And no item stays behind in it for long, so that a rank reads from few shards at a time.
    """
    buffer: list[tuple[float, int, Item]] = []
    for place, item in enumerate(items):
        reach = min(buffer_size, place + buffer_size // 10 + 1)
        heappush(buffer, (place + rng.random() * reach, place, item))
        while buffer and buffer[0][0] <= place + 1:  # no later item can come before it
            yield heappop(buffer)[2]
    yield from (item for _, _, item in sorted(buffer, key=itemgetter(0, 1)))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def share_of_batch(samples: int, sampling: Sampling) -> range:
    """Places of the rank's samples in a batch of `samples` that all ranks share; shares differ by one sample at most."""
    rank, world_size = sampling.rank, sampling.world_size
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


def rank_share(count: int, sampling: Sampling) -> range:
    """Places in the order of `count` samples that belong to the rank.

    In training every rank has its share of each full batch, and the rest of the epoch is left out; if `count` is too small for
    one batch, there is one of `count` samples. In evaluation every place belongs to a rank.

    Raises:
        ValueError: training with fewer samples, in all or in a batch, than ranks.
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
    """The rank's batches: its share of `order`, in training shuffled through one buffer, cut into lists of equal length.

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
    """`order` without the samples that `earlier` numbers of ranks have read.

    Args:
        order: see `epoch_order`.
        earlier: how the epoch began: (world size, batches that each rank read), one after the other, all with the batch size of
            `sampling`.
        sampling: of any rank that shares the rest.
    """
    for world_size, count in earlier:
        ranks = [
            rank_batches(order, replace(sampling, world_size=world_size, rank=rank))
            for rank in range(world_size)
        ]
        read = {number for batches in ranks for batch in batches[:count] for number in batch}
        order = [number for number in order if number not in read]
    return order
