"""Means of scores over images or (image, class) pairs. N pairs, T scores per pair.

A mean over nothing is NaN inside a metric. `measured` removes it from reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def measured(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The finite `values` as floats. NaN and infinite values (not measured) are removed."""
    found = {name: float(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


class LocalisationMetric(Metric):
    """Mean of a score over (image, class) pairs, the number of pairs, and the number of undefined ones.

    `compute()` returns a dict of `mean` (a scalar or (T,), NaN without a defined pair), `count` (pairs in the
    mean) and `undefined` (undefined and missing pairs). Sums are float64, so that neither the order of
    batches nor the number of workers matters.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    defined: Tensor
    undefined: Tensor

    def __init__(self, scores: int | None = None, **kwargs: Any) -> None:
        """`scores` is T, the number of scores per pair; `None` if scores have the shape (N,)."""
        super().__init__(**kwargs)
        shape = () if scores is None else (scores,)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "defined", "undefined"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, undefined: Tensor | None = None, missing: Tensor | None = None) -> None:
        """Adds the scores of N pairs.

        Args:
            scores: (N,) or (N, T).
            undefined: (N,) of bool, undefined pairs, which enter the mean with their score (0 by convention).
            missing: (N,) of bool, pairs without a score, which count as undefined and do not enter the mean.
        """
        undefined = (
            torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            if undefined is None
            else undefined
        )
        if missing is not None:
            self.undefined += missing.sum()
            scores, undefined = scores[~missing], undefined[~missing]
        self.total += scores.detach().double().sum(0)
        self.count += len(scores)
        self.defined += (~undefined).sum()
        self.undefined += undefined.sum()

    def mean(self) -> Tensor:
        """Mean, a scalar or (T,); NaN without a defined pair."""
        return torch.where(self.defined > 0, self.total / self.count, torch.nan)

    def compute(self) -> dict[str, Tensor]:
        return {"mean": self.mean(), "count": self.count, "undefined": self.undefined}


class MeanScore(LocalisationMetric):
    """Mean of a score: `compute()` returns a scalar, NaN without a defined pair."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return self.mean()
