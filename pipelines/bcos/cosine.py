"""Heads that compare an embedding with texts: cosines whose contributions sum to them."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from pipelines.bcos.explanation import Holdable

TINY = 1e-12


class CosineHead(Holdable):
    """Features (N, D) -> scale·cos(features, text_k), (N, K), with the norm of the features held in explanation mode."""

    texts: Tensor

    def __init__(self, texts: Tensor, scale: float = 1.0, hold_norm: bool = True) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the scale of cosines must be a positive number, not {scale}")
        self.register_buffer("texts", F.normalize(texts, dim=-1))
        self.scale, self.hold_norm = scale, hold_norm

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        norm = features.norm(dim=-1, keepdim=True) + TINY
        return self.scale * features @ self.texts.T / (self.hold(norm) if self.hold_norm else norm)
