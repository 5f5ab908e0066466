"""Validation images held out of a training set, of balanced and of long-tailed classes."""

from collections import Counter

import numpy as np
import pytest

from pipelines.data.raw.holdout import held_out
from pipelines.data.shards.sample import DataError


@pytest.mark.parametrize("count", [1, 5, 20, 46])
def test_each_class_keeps_an_image_and_the_count_is_met(count):
    # Some classes have a single image, and class 6 has none.
    labels = [0] * 30 + [1] * 10 + [2] * 8 + [3, 4, 4, 5] + [7]
    chosen = held_out(labels, count, seed=0)
    assert len(chosen) == count
    left = Counter(label for place, label in enumerate(labels) if place not in chosen)
    assert left.keys() == set(labels)
    sizes = Counter(labels)
    for label, size in sizes.items():  # at least its share rounded down, unless the class is too small
        assert sizes[label] - left[label] >= min(size - 1, int(size * count / len(labels)))


def test_more_than_can_be_held_out_is_refused_with_the_most_that_can():
    with pytest.raises(
        DataError, match=r"^val_count: 4 images .* of 6 training images: at most 3, so that each of 3 classes"
    ):
        held_out([0, 1, 1, 2, 2, 2], 4, seed=0)
    assert len(held_out([0, 1, 1, 2, 2, 2], 3, seed=0)) == 3


def test_shares_of_large_classes_do_not_change_with_a_tail():
    """Images that rare classes cannot contribute are drawn evenly from the large classes."""
    labels = np.repeat(np.arange(40), [*[100] * 10, *[1] * 30])
    given = Counter(labels[place] for place in held_out(labels.tolist(), 103, seed=1))
    assert set(given) == set(range(10))
    assert set(given.values()) == {10, 11}
