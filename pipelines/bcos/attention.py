"""Attention whose matrix can be held, and the conversion rules of torch's attention modules.

    out = A·v,   A = softmax(q·kᵀ/sqrt(D))

The attention matrix A is the input-dependent factor. If it is held, the output is linear in the values v.
Conversion leaves the projections to q, k and v linear; the other linear layers become B-cos layers.

Letters: N images, L queries, S keys and values, C channels, D channels per head (E of the values).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pipelines.bcos.convert import Conversion, register_conversion
from pipelines.bcos.errors import ConversionError
from pipelines.bcos.explanation import Holdable


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
        layer: the attention module. Its explanation decides about holding, its `training` about dropout.
        q, k, v: (..., L, D), (..., S, D) and (..., S, E).
        bias: float, broadcast to (..., L, S), added before the softmax: relative positions, or -inf where
            masked.
        scale: factor of q·kᵀ; `None` is D^(-1/2).
        dropout: probability that an entry of the attention matrix is dropped in training mode.

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


class BcosMultiheadAttention(Holdable, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose attention matrix can be held; `out_proj` is a B-cos layer."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results are those of `nn.MultiheadAttention`.

        Inputs and output are (L, C), (L, N, C) or, with `batch_first`, (N, L, C).
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        batched = query.ndim == 3
        q, k, v = self._heads(query, key, value)
        bias = self._bias(q, k, attn_mask, key_padding_mask)
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = self.hold(
                F.dropout(
                    (logits if bias is None else logits + bias).softmax(-1), self.dropout, self.training
                )
            )
            mixed = weights @ v
        else:
            weights, mixed = None, attend(self, q, k, v, bias=bias, dropout=self.dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (N, L, C)
        if batched and not self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (output, weights) if batched else (output[0], None if weights is None else weights[0])

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projects to q, k and v, each (N, heads, L or S, head_dim)."""
        if query is key and key is value and self.in_proj_weight is not None:
            projected = list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            separate = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
            weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = [F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]
        if query.ndim == 2:
            projected = [x.unsqueeze(0) for x in projected]
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]

    def _bias(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Sum of both masks as a float that is added before the softmax; broadcasts to (N, heads, L, S)."""
        bias = None
        if attn_mask is not None:  # (L, S) or (N·heads, L, S)
            bias = _addend(attn_mask, q.dtype)
            bias = bias if bias.ndim == 2 else bias.unflatten(0, (len(q), self.num_heads))
        if key_padding_mask is not None:  # (N, S), or (S,) without a batch dimension
            padding = _addend(key_padding_mask, q.dtype).view(-1, 1, 1, k.shape[2])
            bias = padding if bias is None else bias + padding
        return bias


def _addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a boolean mask to a float one, -inf where it is set; a float mask is returned as it is."""
    return (
        torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
    )


@register_conversion(nn.MultiheadAttention)
def _multihead_attention(module: nn.MultiheadAttention, conversion: Conversion) -> nn.Module:
    if module.bias_k is not None or module.add_zero_attn:
        raise ConversionError(
            f"{conversion.path!r}: a MultiheadAttention with add_bias_kv or add_zero_attn cannot be converted"
        )
    return conversion.recast(conversion.children(module, ["out_proj"]), BcosMultiheadAttention)


register_conversion(NonDynamicallyQuantizableLinear)(
    lambda module, conversion: conversion.by_rule_of(nn.Linear, module)
)


@register_conversion(nn.TransformerEncoderLayer)
def _encoder_layer(module: nn.TransformerEncoderLayer, conversion: Conversion) -> nn.Module:
    if not isinstance(module.activation, nn.Module):
        activations: dict[object, nn.Module] = {F.relu: nn.ReLU(), F.gelu: nn.GELU()}
        if module.activation not in activations:
            raise ConversionError(
                f"{conversion.path!r}: the activation of this TransformerEncoderLayer is a function; "
                "give it as a module"
            )
        module.activation = activations[module.activation]
    # with 1 (ReLU) or 2 (GELU), torch's fused inference would bypass the B-cos layers
    module.activation_relu_or_gelu = 0
    return conversion.children(module)


@register_conversion(nn.TransformerEncoder)
def _encoder(module: nn.TransformerEncoder, conversion: Conversion) -> nn.Module:
    module.use_nested_tensor = False  # nested tensors are only for torch's fused inference
    return conversion.children(module)
