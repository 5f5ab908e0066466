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

    Samples left over by rounding go to the classes with the largest remainders, the lower label first.

    Raises:
        DataError: a class would have no training sample left.
    """
    values = np.asarray(labels, dtype=np.int64)
    if count >= len(values):
        raise DataError(f"val_count: {count} images cannot be held out of {len(values)} training images")
    sizes = np.bincount(values)
    shares, remainders = np.divmod(sizes * count, len(values))
    for label in np.argsort(-remainders, kind="stable")[: count - int(shares.sum())]:
        shares[label] += 1
    chosen: set[int] = set()
    for label, (share, size) in enumerate(zip(shares.tolist(), sizes.tolist(), strict=True)):
        if size and share >= size:
            raise DataError(f"val_count: {count} held out leaves no training image of class {label} (it has {size})")
        rng = Generator(Philox(SeedSequence([seed, label])))
        chosen.update(np.flatnonzero(values == label)[rng.permutation(size)[:share]].tolist())
    return chosen
