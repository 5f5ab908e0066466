"""B-cosification: fine-tuning a converted network (or, as a baseline, training a B-cos network from scratch).

Source: Arya et al., B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable, NeurIPS 2024.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.losses import uniform_off_label_bce
from pipelines.methods.base import Batch, Classification


class Bcosification(Classification):
    """Binary cross-entropy with off-label targets 1/K, on a network of `bcosify`."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss` of a batch with `image` (N, 3, H, W) in [0, 1] and `label` or `labels`."""
        return {"loss": uniform_off_label_bce(model(add_inverse(batch["image"])), self.targets(batch))}


def build_bcosification(spec: models.ModelSpec, pretrained: Path | None, seed: int) -> Bcosification:
    """The method on the B-cos network of `spec`, from the conventional model in a folder or of weights drawn by `seed`."""
    torch.manual_seed(seed)
    network = None if pretrained is None else models.load(pretrained)[0].get_submodule("network")
    return Bcosification(models.assemble(spec, network), spec.task, len(spec.classes))
