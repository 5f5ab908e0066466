"""Which samples a loader reads, in which order: whole numbers alone, a pure function of seed, epoch and place.

Samples of a split are numbered through, shard after shard. Because the manifest has the counts, no shard needs to be
opened to shuffle, to divide an epoch among processes, or to go on in the middle of one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def epoch_order(counts: Sequence[int], *, seed: int, epoch: int, train: bool) -> list[int]:
    """Numbers of all samples in the order of the epoch: as they lie, or in training by permuted shards.

    In training the order also starts at another sample each epoch (and goes round), so that what the last, incomplete
    batch would have held is never the same, even with a single shard.

    Args:
        counts: samples of each shard.
        seed: of the run.
        epoch: counted from 0.
        train: permute and turn.
    """
    if not train:
        return list(range(sum(counts)))
    rng = random.Random(f"shards/{seed}/{epoch}")
    starts = np.cumsum([0, *counts])
    shards = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=False)]
    rng.shuffle(shards)
    order = np.concatenate(shards) if shards else np.arange(0)
    return np.roll(order, rng.randrange(max(1, len(order)))).tolist()


def shuffled(items: Iterable[Item], buffer_size: int, rng: random.Random) -> Iterator[Item]:
    """`items` in random order, of which `buffer_size` at a time are held: complete if there are no more than that."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
        else:
            slot = rng.randrange(buffer_size)
            yield buffer[slot]
            buffer[slot] = item
    rng.shuffle(buffer)
    yield from buffer


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def rank_share(count: int, *, batch_size: int, rank: int, world_size: int, train: bool) -> range:
    """The places in the epoch's order that are one rank's.

    In training every rank has the same number of full batches, and the rest of the epoch is left out; where `count` is
    too small for one full batch a rank, each has one batch of what there is. In evaluation every place is some rank's.

    Raises:
        ValueError: training with fewer samples than ranks.
    """
    full = count // (world_size * batch_size)
    if train and count < world_size:
        raise ValueError(f"{count} training samples cannot feed {world_size} workers; take fewer workers")
    if train and full:
        return range(rank * full * batch_size, (rank + 1) * full * batch_size)
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def worker_share(share: range, *, batch_size: int, worker: int, workers: int) -> range:
    """The part of a rank's `share` that is one loader process's: whole batches, contiguous.

    Process w has the batches w, w + workers, ... of the rank when the processes take turns.
    """
    batches = -(-len(share) // batch_size)
    each, rest = divmod(batches, workers)
    first = worker * each + min(worker, rest)
    last = first + each + (worker < rest)
    return share[first * batch_size : last * batch_size]
