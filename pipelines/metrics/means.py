"""Means of scores over images, or over pairs of an image and a class.

A mean over nothing is NaN inside a metric, and absent from every report: `measured` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def measured(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The finite `values` as floats. A figure that was not measured (NaN, or infinite) is left out."""
    found = {name: float(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


class LocalisationMetric(Metric):
    """Mean of a score over all (image, class) pairs; how many there were, and how many of them are undefined.

    `compute()` gives `{"mean", "count", "undefined"}`. Sums are float64, so that the order and the number of workers do not
    matter.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    defined: Tensor
    undefined: Tensor

    def __init__(self, scores: int | None = None, **kwargs: Any) -> None:
        """`scores` is T, the number of scores of a pair; None for the shape (N,)."""
        super().__init__(**kwargs)
        shape = () if scores is None else (scores,)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "defined", "undefined"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, undefined: Tensor | None = None, missing: Tensor | None = None) -> None:
        """Adds the scores of N pairs.

        Args:
            scores: (N,) or (N, T).
            undefined: (N,) of bool, pairs that count with the score that they have by definition (0).
            missing: (N,) of bool, pairs that have no score. They count as undefined, and in no mean.
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
        """The mean, a scalar or (T,); NaN without any defined pair."""
        return torch.where(self.defined > 0, self.total / self.count, torch.nan)

    def compute(self) -> dict[str, Tensor]:
        """The mean (NaN without any defined pair), the number of pairs in it, the number of undefined ones."""
        return {"mean": self.mean(), "count": self.count, "undefined": self.undefined}


class MeanScore(LocalisationMetric):
    """The mean of a score alone: `compute()` gives a scalar, NaN without any defined pair."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """In the range of the score."""
        return self.mean()
