"""How far a student follows its teacher. Source: Parchami-Araghi et al., Good Teachers Explain, ECCV 2024, section 4."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pipelines.metrics.means import MeanScore


class Agreement(MeanScore):
    """Share of images with the same top-1 prediction, over batches: `update(student's logits (N, K), teacher's (N, K))`."""

    higher_is_better = True

    def update(self, preds: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        """Logits (N, K) of both."""
        super().update(preds.argmax(1) == teacher.argmax(1))


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Share of images with the same top-1 prediction: logits (N, K) of both -> a scalar in [0, 1], float64."""
    return (student_logits.argmax(1) == teacher_logits.argmax(1)).double().mean()


def explanation_similarity(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Cosine of two maps: (N, ...) of both -> (N,) in [-1, 1]; 0 where one of them is zero."""
    student, teacher = (F.normalize(maps.flatten(1).float(), dim=1) for maps in (student_maps, teacher_maps))
    return (student * teacher).sum(1)
