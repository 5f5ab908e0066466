"""B-cosification: fine-tuning a converted network (or, as a baseline, training a B-cos network from scratch).

Source: Arya et al., B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable, NeurIPS 2024.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.bcos import add_inverse
from pipelines.losses import uniform_off_label_bce
from pipelines.methods.base import Batch, Classification


class Bcosification(Classification):
    """Binary cross-entropy with off-label targets 1/K, on a network of `bcosify`."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss` of a batch with `image` (N, 3, H, W) in [0, 1] and `label` or `labels`."""
        return {"loss": uniform_off_label_bce(model(add_inverse(batch["image"])), self.targets(batch))}
