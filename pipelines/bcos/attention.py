"""Attention whose matrix can be held: softmax(q·kᵀ) is a factor that depends on the input, v is what it weighs."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from pipelines.bcos.hold import Holdable


def attend(
    layer: Holdable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale·q·kᵀ + bias)·v, with the softmax held in explanation mode.

    Args:
        layer: whose attention it is; its `training` decides about dropout.
        q, k, v: (..., L, D), (..., S, D) and (..., S, E).
        bias: float, broadcast to (..., L, S), added before the softmax (relative positions, -inf where masked).
        scale: by default D^(-1/2).
        dropout: probability that an entry of the matrix is dropped in training.

    Returns:
        (..., L, E).
    """
    dropout = dropout if layer.training else 0.0
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if isinstance(scale, Tensor):
        q, scale = q * scale, 1.0
    if layer.explanation is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    logits = (q * scale) @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return layer.hold(F.dropout(weights, dropout)) @ v
