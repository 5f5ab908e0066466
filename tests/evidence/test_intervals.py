"""Intervals of figures: their values, their coverage, and paired differences."""

import math

import numpy as np
import pandas
import pytest

from pipelines.evidence.intervals import difference, interval


def flips(chance, count, seed):
    """Parts of an accuracy: `count` images, each right with the probability `chance`."""
    right = np.random.default_rng(seed).random(count) < chance
    return pandas.DataFrame(
        {"top": right.astype(float), "bottom": 1.0}, index=[f"k{n}" for n in range(count)]
    )


def test_the_interval_of_an_accuracy_is_that_of_the_binomial():
    found = interval(flips(0.8, 1000, seed=1))
    spread = 1.96 * math.sqrt(found.value * (1 - found.value) / 1000)
    assert found.low == pytest.approx(found.value - spread, abs=0.004)
    assert found.high == pytest.approx(found.value + spread, abs=0.004)


def test_the_same_seed_gives_the_same_interval():
    rows = flips(0.8, 200, seed=1)
    assert interval(rows, seed=3) == interval(rows, seed=3)
    assert interval(rows, seed=3) != interval(rows, seed=4)


def test_two_equal_models_do_not_differ():
    inside = 0
    for seed in range(20):
        found = difference(flips(0.8, 400, seed=seed), flips(0.8, 400, seed=1000 + seed), seed=seed)
        inside += found.low <= 0 <= found.high
    assert inside >= 17


def test_a_paired_difference_is_tighter_than_two_intervals():
    """Two models that fail on the same images differ by little, whatever images are drawn."""
    one = flips(0.7, 500, seed=1)
    other = one.copy()
    other.iloc[:10, 0] = 1 - other.iloc[:10, 0]
    found, alone = difference(other, one), interval(one)
    assert found.value == pytest.approx(other["top"].mean() - one["top"].mean())
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_a_difference_is_measured_on_the_images_of_both():
    one = flips(0.8, 100, seed=1)
    other = flips(0.6, 60, seed=2)
    found = difference(one, other)
    assert found.value == pytest.approx(one["top"][:60].mean() - other["top"].mean())


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_have_no_interval(count):
    assert interval(flips(0.8, count, seed=1)) is None
    assert difference(flips(0.8, count, seed=1), flips(0.8, 50, seed=1)) is None
