"""Conventional training of the model that B-cosification starts from."""

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
    """Trains by cross-entropy with label smoothing (multiclass) or binary cross-entropy (multilabel)."""

    def __init__(
        self, module: nn.Module, task: str, num_classes: int, mixup: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(module, task, num_classes, mixup)
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = model(batch["image"])
        if self.task == "multilabel":
            return {"loss": F.binary_cross_entropy_with_logits(logits, batch["target"])}
        return {"loss": F.cross_entropy(logits, batch["target"], label_smoothing=self.label_smoothing)}


def build_pretrain(model: ModelParams, spec: models.ModelSpec, params: PretrainParams, seed: int) -> Pretrain:
    """Builds the method on the network of `model` with its pretrained weights.

    If their number of classes is another, the network gets a new head with random weights drawn with `seed`.
    """
    torch.manual_seed(seed)
    classes = len(spec.classes)
    network = models.build(
        model.name, model.weights, num_classes=classes, sha256=model.sha256, options=model.options
    )
    return Pretrain(models.assemble(spec, network), spec.task, classes, params.mixup, params.label_smoothing)
