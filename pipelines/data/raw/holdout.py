"""The validation split held out of a training set, and the order of the rest, both drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.random import Generator, Philox, SeedSequence

from pipelines.data.shards.sample import DataError

T = TypeVar("T")


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """`items` in an order drawn by `seed`."""
    order = Generator(Philox(SeedSequence([seed, len(items)]))).permutation(len(items))
    return [items[position] for position in order]


def held_out(labels: Sequence[int], count: int, seed: int) -> set[int]:
    """Positions of `count` samples drawn by `seed`, stratified: each class has its share of `labels`.

    Samples left over by rounding go to the classes with the largest remainders, the lower label first. Each class keeps at least
    one training sample; what a class of one or two samples cannot give is drawn from the larger ones.

    Raises:
        DataError: a class would have no training sample left.
    """
    values = np.asarray(labels, dtype=np.int64)
    sizes = np.bincount(values)
    most = np.maximum(sizes - 1, 0)
    if count > most.sum():
        limit = (
            f"at most {most.sum()}, so that each of {np.count_nonzero(sizes)} classes keeps one to train on"
        )
        raise DataError(
            f"val_count: {count} images cannot be held out of {len(values)} training images: {limit}"
        )
    shares = np.minimum(sizes * count // len(values), most)
    while (missing := count - int(shares.sum())) > 0:
        remainders = np.where(shares < most, sizes * count - shares * len(values), -np.iinfo(np.int64).max)
        shares[np.argsort(-remainders, kind="stable")[: min(missing, np.count_nonzero(shares < most))]] += 1
    chosen: set[int] = set()
    for label, (share, size) in enumerate(zip(shares.tolist(), sizes.tolist(), strict=True)):
        rng = Generator(Philox(SeedSequence([seed, label])))
        chosen.update(np.flatnonzero(values == label)[rng.permutation(size)[:share]].tolist())
    return chosen
