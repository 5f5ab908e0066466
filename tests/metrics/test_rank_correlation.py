"""Spearman's rank correlation against values computed by hand."""

import math

import torch

from pipelines.metrics import rank_correlation


def test_values_by_hand():
    one = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [5.0, 5.0, 9.0], [0.0, 1.0, 7.0]])
    other = torch.tensor([[10.0, 30.0, 20.0], [3.0, 2.0, -1.0], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3]])
    expected = torch.tensor([0.5, -1.0, math.sqrt(3) / 2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(rank_correlation(one, other), expected)


def test_undefined_values():
    nan = math.nan
    pairs = [([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0, nan], [1.0, 2.0])]
    for one, other in [*pairs, ([1.0, 2.0, 3.0], [1.0, 2.0, nan]), ([], [])]:
        assert rank_correlation(torch.tensor(one), torch.tensor(other)).isnan()


def test_only_the_order_matters():
    one, other = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rank_correlation(one, other), rank_correlation(one.exp(), 3 * other - 1))
    torch.testing.assert_close(rank_correlation(one, other), -rank_correlation(-one, other))
