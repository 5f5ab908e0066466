"""Conventional training: the model that everyone has, and that B-cosification starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import models
from pipelines.methods.method import Classification

if TYPE_CHECKING:
    from pipelines.params import ModelParams, PretrainParams


class Pretrain(Classification):
    """Cross-entropy (multiclass, with label smoothing) or binary cross-entropy (multilabel)."""

    def __init__(
        self, module: nn.Module, task: str, num_classes: int, mixup: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(module, task, num_classes, mixup)
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a prepared batch."""
        logits = model(batch["image"])
        if self.task == "multilabel":
            return {"loss": F.binary_cross_entropy_with_logits(logits, batch["target"])}
        return {"loss": F.cross_entropy(logits, batch["target"], label_smoothing=self.label_smoothing)}


def build_pretrain(model: ModelParams, spec: models.ModelSpec, params: PretrainParams, seed: int) -> Pretrain:
    """The method on the network of `model` with its pretrained weights; a new head, drawn by `seed`, for other classes."""
    torch.manual_seed(seed)
    classes = len(spec.classes)
    network = models.build(
        model.name, model.weights, num_classes=classes, sha256=model.sha256, options=model.options
    )
    return Pretrain(models.assemble(spec, network), spec.task, classes, params.mixup, params.label_smoothing)
