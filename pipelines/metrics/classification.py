"""Classification metrics. N images, K classes.

All metrics take the model's logits. Counts are integers and sums are float64, so that results do not depend
on the number of workers or the order of batches. A mean over nothing, such as the precision of a model that
predicts no class, is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MultilabelF1Score, MultilabelPrecision, MultilabelRecall

from pipelines.metrics.means import MeanScore


def multiclass_metrics(num_classes: int) -> MetricCollection:
    """`accuracy`, `calibration_error` and, for 6 classes or more, `accuracy_top5`.

    `update(logits (N, K), labels (N,))`.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": Accuracy(),
        "calibration_error": CalibrationError(),
    }
    if num_classes >= 6:
        metrics["accuracy_top5"] = Accuracy(top=5)
    return MetricCollection(metrics, compute_groups=False)


def multilabel_metrics(num_classes: int) -> MetricCollection:
    """Micro-averaged `f1`, `precision` and `recall` at the threshold logit >= 0.

    `update(logits (N, K), labels (N, K) of {0, 1})`.
    """
    kinds: dict[str, Metric | MetricCollection] = {
        "f1": _F1(num_classes),
        "precision": _Precision(num_classes),
    }
    return MetricCollection(kinds | {"recall": _Recall(num_classes)})


class Accuracy(MeanScore):
    """Share of images whose label is among the `top` largest logits: `update(logits (N, K), labels (N,))`."""

    higher_is_better = True

    def __init__(self, top: int = 1) -> None:
        super().__init__()
        self.top = top

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        first = preds.argmax(1, keepdim=True) if self.top == 1 else preds.topk(self.top, dim=1).indices
        super().update((first == target[:, None]).any(1))


class _OfLogits:
    """Thresholds logits at 0; torchmetrics guesses from a batch's range whether it has probabilities."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="micro", validate_args=False, zero_division=torch.nan)  # type: ignore[call-arg]

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds >= 0).long(), target.long())  # type: ignore[misc]


class _F1(_OfLogits, MultilabelF1Score):
    pass


class _Precision(_OfLogits, MultilabelPrecision):
    pass


class _Recall(_OfLogits, MultilabelRecall):
    pass


class CalibrationError(Metric):
    """Expected calibration error of the softmax confidence, over equal bins of [0, 1].

    Σ_bins (share of images in the bin)·|accuracy - mean confidence|. `update(logits (N, K), labels (N,))`.
    Models trained with binary cross-entropy are measured by the softmax, too, so that models compare.
    `compute()` is in [0, 1], or NaN without images or if a logit is not finite. torchmetrics has this metric
    with float32 sums.

    Source: Guo et al., On Calibration, ICML 2017, eq. 3.
    """

    higher_is_better = False
    full_state_update = False
    counts: Tensor
    correct: Tensor
    confidences: Tensor

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = bins
        for name in ("counts", "correct", "confidences"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        confidences, predicted = preds.detach().double().softmax(1).max(1)
        bins = (confidences.nan_to_num() * self.bins).long().clamp_max(self.bins - 1)
        self.counts.index_add_(0, bins, torch.ones_like(confidences))
        self.correct.index_add_(0, bins, (predicted == target).double())
        self.confidences.index_add_(0, bins, confidences)

    def compute(self) -> Tensor:
        return (self.correct - self.confidences).abs().sum() / self.counts.sum()
