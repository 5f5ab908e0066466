"""Draws, by a seed, the validation split that is held out of a training set, and the order of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.random import Generator, Philox, SeedSequence

from pipelines.data.shards.sample import DataError

T = TypeVar("T")


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """`items` in a random order that depends on `seed` and their number only."""
    order = Generator(Philox(SeedSequence([seed, len(items)]))).permutation(len(items))
    return [items[position] for position in order]


def held_out(labels: Sequence[int], count: int, seed: int) -> set[int]:
    """Positions of `count` samples drawn by `seed`, stratified by class.

    Each class contributes in proportion to its size. Samples left over by rounding come from the classes with
    the largest remainders, lower labels first. Each class keeps at least one training sample; what a small
    class cannot contribute comes from the larger ones.

    Raises:
        DataError: with `count` samples held out, a class would have no training sample left.
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
