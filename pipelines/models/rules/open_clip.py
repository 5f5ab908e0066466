"""Conversion rules for open_clip's image towers (`ModifiedResNet`, `VisionTransformer`, `TimmModel`).

Convolutions, feed-forward layers and the output projections of attention become B-cos layers. The projections
to q, k and v stay linear, and so does the last layer of a tower (see `EmbeddingTower`).

N images, L tokens, C features of a token, H heads, D features of a head, h × w places of a feature map. In
the shapes of towers: H × W pixels, D features of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    CustomTransformer,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    PatchDropout,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from pipelines.bcos import Conversion, ConversionError, Holdable, attend, register_conversion
from pipelines.bcos.activations import GatedQuickGELU
from pipelines.bcos.convert import convert_children, keep, recast_to
from pipelines.bcos.network import EmbeddingTower
from pipelines.bcos.norms import BcosLayerNorm
from pipelines.bcos.precision import widened

# Layers and blocks ------------------------------------------------------------------------------------------


class HeldLayerNorm(BcosLayerNorm):
    """LayerNorm whose output has the dtype of its input, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class HeldLayerNormFp32(BcosLayerNorm):
    """LayerNorm computed in float32 at least, whose output has the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(widened(x)).to(x.dtype)


register_conversion(LayerScale, PatchDropout)(keep)
register_conversion(LayerNorm)(recast_to(HeldLayerNorm))
register_conversion(LayerNormFp32)(recast_to(HeldLayerNormFp32))
register_conversion(QuickGELU)(lambda module, conversion: GatedQuickGELU())
register_conversion(
    Bottleneck, Transformer, CustomTransformer, ResidualAttentionBlock, CustomResidualAttentionBlock
)(convert_children)

# Attention --------------------------------------------------------------------------------------------------


class HeldAttention(Holdable, Attention):
    """open_clip's attention with all its options; the attention matrix can be held."""

    num_heads: int
    logit_scale_max: float
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    logit_scale: Tensor | None
    head_scale: Tensor | None
    attn_drop: nn.Dropout
    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    out_proj: nn.Module
    out_drop: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(N, L, C) -> (N, L, C); a float `attn_mask` is added to the attention logits (N, H, L, L)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, L, D) each
        scale = None
        if self.logit_scale is None:
            q, k = self.ln_q(q), self.ln_k(k)
        else:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            scale = self.logit_scale.clamp(max=self.logit_scale_max).exp()
        mixed = attend(self, q, k, v, bias=attn_mask, scale=scale, dropout=self.attn_drop.p)
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(mixed.transpose(1, 2).flatten(2))))


@register_conversion(Attention)
def _attention(module: Attention, conversion: Conversion) -> nn.Module:
    return conversion.recast(conversion.children(module, ["ln_inner", "out_proj", "out_drop"]), HeldAttention)


@register_conversion(AttentionalPooler)
def _attentional_pooler(module: AttentionalPooler, conversion: Conversion) -> nn.Module:
    # the queries are learned and do not depend on the image, so their norm stays ordinary
    return conversion.children(module, ["attn", "ln_k"])


class HeldAttentionPool2d(Holdable, AttentionPool2d):
    """open_clip's attention pool; the attention matrix can be held.

    Its only query q comes from the first token, the mean of all places. Therefore W_k is applied to q, and
    W_v to the weighted mean of the tokens x_l, instead of to each token:

        q·(W_k x_l) = (W_kᵀ q)·x_l,   Σ_l a_l (W_v x_l) = W_v Σ_l a_l x_l
    """

    num_heads: int
    positional_embedding: Tensor
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    c_proj: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, output features)."""
        tokens_NLC = self.tokens(features)
        with self.computing_factor():
            q_NHD = self._of_heads(self.q_proj(tokens_NLC[:, 0]), 1)
            logits_NHL = torch.einsum(
                "nhd,hdc->nhc", q_NHD, self._of_heads(self.k_proj.weight)
            ) @ tokens_NLC.transpose(1, 2)
            if self.k_proj.bias is not None:
                # equal for all tokens, so the softmax ignores it; the bias still gets a gradient (of 0)
                logits_NHL = logits_NHL + (q_NHD * self._of_heads(self.k_proj.bias)).sum(-1, keepdim=True)
            matrix_NHL = (logits_NHL * q_NHD.shape[-1] ** -0.5).softmax(-1)
        mixed_NHC = self.hold(matrix_NHL) @ tokens_NLC
        values = torch.einsum("nhc,hdc->nhd", mixed_NHC, self._of_heads(self.v_proj.weight)).flatten(1)
        return self.c_proj(values if self.v_proj.bias is None else values + self.v_proj.bias)

    def tokens(self, features: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 1 + h·w, C): mean of all places, then each place, plus position embeddings."""
        places_NLC = features.flatten(2).transpose(1, 2)
        tokens_NLC = torch.cat([places_NLC.mean(1, keepdim=True), places_NLC], 1)
        if "positional_embedding" not in self._parameters:  # removed by `bcosify`: takes maps of any size
            return tokens_NLC
        return tokens_NLC + self.positional_embedding.to(tokens_NLC.dtype)

    def _of_heads(self, projected: Tensor, dim: int = 0) -> Tensor:
        """Splits axis `dim`, of H·D features, into two axes (H, D)."""
        return projected.unflatten(dim, (self.num_heads, -1))


register_conversion(AttentionPool2d)(recast_to(HeldAttentionPool2d))

# Towers -----------------------------------------------------------------------------------------------------


class ResNetTower(EmbeddingTower, ModifiedResNet):
    """CLIP's ResNet, which ends in an attention pool: (N, 6, H, W) -> (N, D)."""


@register_conversion(ModifiedResNet)
def _modified_resnet(module: ModifiedResNet, conversion: Conversion) -> nn.Module:
    tower: Any = conversion.recast(conversion.children(module), ResNetTower)
    tower.projection = None if module.attnpool is None else "attnpool.c_proj"
    return tower


class TransformerTower(EmbeddingTower, VisionTransformer):
    """CLIP's vision transformer: (N, 6, H, W) -> (N, D); the matrix `proj` becomes a linear layer."""

    transformer: nn.Module
    proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, H, W) -> (N, D); an attentional pool with one query gives (N, 1, C), which is squeezed."""
        pooled, _ = self._pool(self.transformer(self._embeds(x)))  # type: ignore[operator]
        return self.proj(pooled if pooled.ndim == 2 else pooled.squeeze(1))


@register_conversion(VisionTransformer)
def _vision_transformer(module: VisionTransformer, conversion: Conversion) -> nn.Module:
    if module.output_tokens or (
        module.pool_type == "none" and getattr(module, "attn_pool_contrastive", None) is None
    ):
        raise ConversionError(
            f"the tower at {conversion.path or 'the top'!r} gives tokens, not an embedding for each image: "
            "build it with output_tokens=False and a pool_type of 'tok' or 'avg'"
        )
    tower: Any = conversion.recast(conversion.children(module), TransformerTower)
    matrix = tower.proj
    del tower.proj
    if matrix is None:
        tower.proj = nn.Identity()
        return tower
    width, features = matrix.shape
    tower.proj = nn.Linear(width, features, bias=False)
    tower.proj.weight = conversion.derived(matrix, matrix.T.contiguous())
    tower.projection = "proj"
    return tower


class TimmTower(EmbeddingTower, TimmModel):
    """A timm network (`trunk`) and a head: (N, 6, H, W) -> (N, D)."""


@register_conversion(TimmModel)
def _timm_model(module: TimmModel, conversion: Conversion) -> nn.Module:
    projection = _projection_of(module)
    if projection is not None:
        conversion.leave(module.get_submodule(projection))
    tower: Any = conversion.recast(conversion.children(module), TimmTower)
    tower.projection = projection
    return tower


def _projection_of(tower: TimmModel) -> str | None:
    """Name of the last linear layer: in the head, or else the trunk's classifier; `None` if there is none."""
    for name in ("head.proj", "head.mlp.fc2"):
        if name in dict(tower.named_modules()):
            return name
    classifier = tower.trunk.get_classifier()
    named = ((name, module) for name, module in tower.named_modules() if module is classifier)
    return next((name for name, module in named if isinstance(module, nn.Linear)), None)
