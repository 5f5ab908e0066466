"""Spearman's rank correlation of the last dimension of two tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's rank correlation over the last dimension: (..., E), (..., E) -> (...) in [-1, 1], float64.

    Equal values share the mean of their ranks. The result is NaN where it is undefined: fewer than two
    values, all values of one side equal, or a NaN among them.
    """
    a, b = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_ranks(one), _ranks(other)))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    broken = one.isnan().any(-1) | other.isnan().any(-1) | (scale == 0)
    return torch.where(broken, torch.nan, (a * b).sum(-1) / scale)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 over the last dimension, as float64; equal values share the mean of their ranks."""
    one, other = values[..., :, None], values[..., None, :]
    return (other < one).sum(-1).double() + ((other == one).sum(-1) + 1) / 2
