"""Agreement of a student with its teacher, in predictions and explanations. N images, K classes.

Source: Parchami-Araghi et al., Good Teachers Explain, ECCV 2024, section 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pipelines.metrics.means import MeanScore


class Agreement(MeanScore):
    """Share of images with equal top-1 predictions, in [0, 1], accumulated over batches.

    `update(student_logits (N, K), teacher_logits (N, K))`.
    """

    higher_is_better = True

    def update(self, preds: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        super().update(preds.argmax(1) == teacher.argmax(1))


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Share of images with equal top-1 predictions: logits (N, K), (N, K) -> float64 scalar in [0, 1]."""
    return (student_logits.argmax(1) == teacher_logits.argmax(1)).double().mean()


def explanation_similarity(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Cosine of two maps per image: (N, ...), (N, ...) -> (N,) in [-1, 1]; 0 if one of the maps is zero."""
    student, teacher = (F.normalize(maps.flatten(1).float(), dim=1) for maps in (student_maps, teacher_maps))
    return (student * teacher).sum(1)
