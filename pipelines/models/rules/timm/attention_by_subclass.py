"""timm's attention modules whose matrix passes through no child: a subclass overrides `forward`.

The projections to q, k and v stay linear, and the output projection becomes a B-cos layer.

N images, C channels, H × W places, L tokens, D features of a head.
"""

from __future__ import annotations

import timm.layers
import timm.models
from torch import Tensor, nn

from pipelines.bcos import Holdable, register_conversion
from pipelines.bcos.attention import attend
from pipelines.bcos.convert import Rule

layers, models = timm.layers, timm.models


class HeldAttentionPoolLatent(Holdable, layers.AttentionPoolLatent):
    """Attention pooling by learned queries; the attention matrix can be held."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(N, L, C) -> (N, C), or (N, queries, C) if the outputs of the queries are not pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed
        q = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(self, self.q_norm(q), self.k_norm(k), v, bias=attn_mask)
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return {"token": lambda: x[:, 0], "avg": lambda: x.mean(1)}.get(self.pool, lambda: x)()


class _BiasedByDistance(Holdable):
    """Attention with a learned bias per distance of two places, as in LeViT; the matrix can be held."""

    num_heads: int
    scale: float
    attention_biases: nn.Parameter
    attention_bias_idxs: Tensor

    def _heads(self, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """(N, L, heads·D) or (N, heads·D, H, W) -> one (N, heads, L, size) per size; sizes sum to D."""
        tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(sizes, dim=-1)

    def _bias(self) -> Tensor:
        """(heads, queries, keys)."""
        return self.attention_biases[:, self.attention_bias_idxs]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, heads, L, D) each -> (N, L, heads·D)."""
        return attend(self, q, k, v, bias=self._bias(), scale=self.scale).transpose(1, 2).flatten(2)


def _as_maps(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, height·width, C) -> (N, C, height, width)."""
    return tokens.transpose(1, 2).unflatten(-1, (height, width))


class HeldEfficientFormerAttention(_BiasedByDistance, models.efficientformer.Attention):
    """EfficientFormer's attention."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        return self.proj(self._attend(*self._heads(self.qkv(x), self.key_dim, self.key_dim, self.val_dim)))


class HeldTinyVitAttention(_BiasedByDistance, models.tiny_vit.Attention):
    """TinyViT's attention, which starts with a norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        return self.proj(
            self._attend(*self._heads(self.qkv(self.norm(x)), self.key_dim, self.key_dim, self.val_dim))
        )


class HeldLevitAttention(_BiasedByDistance, models.levit.Attention):
    """LeViT's attention."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) or, if `use_conv`, (N, C, H, W) -> the same shape."""
        out = self._attend(*self._heads(self.qkv(x), self.key_dim, self.key_dim, self.val_dim))
        return self.proj(_as_maps(out, *x.shape[-2:]) if self.use_conv else out)


class HeldLevitDownsample(_BiasedByDistance, models.levit.AttentionDownsample):
    """LeViT's attention with fewer queries than keys."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) or, if `use_conv`, (N, C, H, W) -> the same layout, grid sides divided by the stride."""
        queries = self.q(x)
        out = self._attend(
            *self._heads(queries, self.key_dim), *self._heads(self.kv(x), self.key_dim, self.val_dim)
        )
        return self.proj(_as_maps(out, *queries.shape[-2:]) if self.use_conv else out)


class HeldAttention2d(_BiasedByDistance, models.efficientformer_v2.Attention2d):
    """EfficientFormer v2's attention with talking heads, plus convolved values."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        v = self.v(x)
        (q,), (k,), (heads,) = (
            self._heads(self.q(x), self.key_dim),
            self._heads(self.k(x), self.key_dim),
            self._heads(v, self.d),
        )
        logits = self.talking_head1(q @ k.transpose(-2, -1) * self.scale + self._bias())
        matrix = self.hold(self.talking_head2(logits.softmax(-1)))
        x = (matrix @ heads).transpose(2, 3).reshape(v.shape) + self.v_local(v)
        return self.proj(self.act(x if self.upsample is None else self.upsample(x)))


class HeldAttention2dDownsample(_BiasedByDistance, models.efficientformer_v2.Attention2dDownsample):
    """EfficientFormer v2's attention with queries at half the resolution, plus convolved values."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / 2), ceil(W / 2))."""
        v = self.v(x)
        local = self.v_local(v)
        q, k, heads = (
            self._heads(self.q(x), self.key_dim),
            self._heads(self.k(x), self.key_dim),
            self._heads(v, self.d),
        )
        return self.proj(self.act(_as_maps(self._attend(*q, *k, *heads), *local.shape[-2:]) + local))


class HeldChannelAttention(Holdable, models.davit.ChannelAttention):
    """DaViT's attention between channels: the matrix softmax(kᵀ·v) (D × D) weighs the channels of q."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        # (N, heads, D, L) each
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)
        return self.proj(attend(self, k, v, q, scale=self.scale).permute(0, 3, 1, 2).flatten(2))


def _overridden(held: type[nn.Module], converted: tuple[str, ...]) -> Rule:
    """Returns a rule that recasts a module to `held` and converts its linear path, `converted`."""
    return lambda module, conversion: conversion.recast(conversion.children(module, converted), held)


# original type, its subclass, and the linear path, which includes norms before and after q, k and v
for _type, _held, _names in (
    (layers.AttentionPoolLatent, HeldAttentionPoolLatent, ("proj", "proj_drop", "norm", "mlp")),
    (models.davit.ChannelAttention, HeldChannelAttention, ("proj",)),
    (models.efficientformer.Attention, HeldEfficientFormerAttention, ("proj",)),
    (models.tiny_vit.Attention, HeldTinyVitAttention, ("norm", "proj")),
    (models.levit.Attention, HeldLevitAttention, ("qkv.bn", "proj")),
    (models.levit.AttentionDownsample, HeldLevitDownsample, ("kv.bn", "proj")),
    (
        models.efficientformer_v2.Attention2d,
        HeldAttention2d,
        ("stride_conv", "v.bn", "v_local", "upsample", "act", "proj"),
    ),
    (
        models.efficientformer_v2.Attention2dDownsample,
        HeldAttention2dDownsample,
        ("v.bn", "v_local", "act", "proj"),
    ),
):
    register_conversion(_type)(_overridden(_held, _names))
