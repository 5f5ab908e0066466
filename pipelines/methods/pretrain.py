"""Conventional training: the model that everyone has, and that B-cosification starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.methods.base import Batch, Classification

if TYPE_CHECKING:
    from pipelines.params import ModelParams


class Pretrain(Classification):
    """Cross-entropy (multiclass, with label smoothing) or binary cross-entropy (multilabel)."""

    def __init__(self, module: nn.Module, task: str, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__(module, task, num_classes)
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss` of a batch with `image` (N, 3, H, W) in [0, 1] and `label` or `labels`."""
        logits, targets = model(add_inverse(batch["image"])), self.targets(batch)
        if targets.ndim == 2:
            return {"loss": F.binary_cross_entropy_with_logits(logits, targets)}
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)}


def build_pretrain(model: ModelParams, spec: models.ModelSpec, label_smoothing: float, seed: int) -> Pretrain:
    """The method on the network of `model` with its pretrained weights; a new head, drawn by `seed`, for other classes."""
    torch.manual_seed(seed)
    classes = len(spec.classes)
    network = models.build(model.name, model.weights, num_classes=classes, sha256=model.sha256, options=model.options)
    return Pretrain(models.assemble(spec, network), spec.task, classes, label_smoothing)
