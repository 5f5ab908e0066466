"""Conversion rules for timm's module types.

A *factor* is a function of the input that multiplies features: an attention matrix, a gate, a norm's scale.
Explanation mode must hold it, but timm computes most factors inside a `forward`. If the factor passes through
a child there (the softmax through `attn_drop`, a gate through `gate` or `act`), the rule makes that child
hold its output, and timm's `forward` is kept. If there is no such child, a subclass overrides `forward`.

The *linear path* is the one of the features that factors multiply. Its layers become B-cos layers. Layers
that only compute a factor stay ordinary.

N images, C channels, H × W places, L tokens, D features of a head.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import timm.layers
import timm.models
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.activations import GELU, GELUTanh, HardMish, HardSwish, Mish, PReLU, QuickGELU, Swish, Tanh
from timm.layers.activations_me import HardMishMe, HardSwishMe, MishMe, SwishMe
from timm.layers.padding import pad_same
from torch import Tensor, nn

from pipelines.bcos import BcosConv2d, Conversion, ConversionError, Holdable, register_conversion
from pipelines.bcos.activations import (
    Gate,
    GatedGELU,
    GatedHardswish,
    GatedMish,
    GatedQuickGELU,
    GatedSiLU,
    GatedTanh,
)
from pipelines.bcos.attention import attend
from pipelines.bcos.convert import Rule, convert_children, keep, recast_to
from pipelines.bcos.norms import BcosLayerNorm2d

layers, models = timm.layers, timm.models

# Linear already ---------------------------------------------------------------------------------------------


register_conversion(
    layers.DropPath, layers.DropBlock2d, layers.PatchDropout, layers.PatchDropoutWithIndices,
    layers.LayerScale, layers.LayerScale2d, layers.BlurPool2d, layers.AvgPool2dSame,
    layers.pool2d_same.MaxPool2dSame, layers.SpaceToDepth, layers.DepthToSpace, layers.AdaptiveAvgMaxPool2d,
    layers.adaptive_avgmax_pool.AdaptiveCatAvgMaxPool2d, layers.adaptive_avgmax_pool.FastAdaptiveMaxPool,
    layers.adaptive_avgmax_pool.FastAdaptiveAvgMaxPool, layers.adaptive_avgmax_pool.FastAdaptiveCatAvgMaxPool,
    PReLU, models.mlp_mixer.Affine, models.metaformer.Scale, models.fastvit.LayerScale2d,
    models.swiftformer.LayerScale2d, models.efficientformer.Flat, models.levit.Downsample,
)(keep)  # fmt: skip
# Positions do not depend on the image, so layers that compute their embeddings or biases stay ordinary.
register_conversion(
    layers.RelPosBias, layers.RelPosMlp, layers.RelPosBiasTf, layers.RotaryEmbedding,
    layers.RotaryEmbeddingCat, layers.RotaryEmbeddingMixed, layers.RotaryEmbeddingDinoV3, layers.FourierEmbed,
    models.beit.RelativePositionBias, models.xcit.PositionalEncodingFourier,
    models.edgenext.PositionalEncodingFourier,
)(keep)  # fmt: skip
# The own parameters of these types are tokens, positions, masks and layer scales: none of them is a factor.
register_conversion(
    models.vision_transformer.VisionTransformer, models.deit.VisionTransformerDistilled, models.beit.Beit,
    models.beit.Block, models.eva.Eva, models.eva.EvaBlock, models.eva.EvaBlockPostNorm, models.cait.Cait,
    models.cait.LayerScaleBlock, models.cait.LayerScaleBlockClassAttn, models.xcit.Xcit, models.xcit.XCABlock,
    models.xcit.ClassAttentionBlock, models.convnext.ConvNeXtBlock, models.inception_next.MetaNeXtBlock,
    models.edgenext.ConvBlock, models.edgenext.SplitTransposeBlock, models.rdnet.DenseBlock,
    models.swin_transformer.SwinTransformerBlock, models.swin_transformer_v2.SwinTransformerV2Block,
    models.swin_transformer_v2_cr.SwinTransformerV2CrBlock, models.mlp_mixer.ResBlock,
    models.pit.PoolingVisionTransformer, models.visformer.Visformer, models.nest.NestLevel,
    models.nfnet.NormFreeBlock, models.volo.VOLO, models.vision_transformer_relpos.VisionTransformerRelPos,
    models.convit.ConVit, models.tnt.TNT, models.vision_transformer_sam.VisionTransformerSAM,
)(convert_children)  # fmt: skip


@register_conversion(
    models.byobnet.RepVggBlock, models.byobnet.MobileOneBlock, models.fastvit.MobileOneBlock,
    models.crossvit.CrossVit,
)  # fmt: skip
def _branches(module: nn.Module, conversion: Conversion) -> nn.Module:
    # several parallel layers take the image, not just the first; the weight W of each becomes [W, -W]/2
    layers_of_image = [
        layer for layer in module.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3
    ]
    if any(layer is conversion.image_layer for layer in layers_of_image):
        for layer in layers_of_image:
            dataclasses.replace(conversion, image_layer=layer).child(layer, "branch")
    return conversion.children(module)


# Norms, convolutions and pools that extend or replace torch's -----------------------------------------------


class HeldRmsNorm(Holdable, layers.RmsNorm):
    """timm's RMS norm, x / sqrt(mean x² + ε); the factor 1 / sqrt(...) can be held."""

    channels_first = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) or, if `channels_first`, (N, C, ...) -> the same shape."""
        if self.explanation is None and not self.channels_first:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        axes = (1,) if self.channels_first else tuple(range(-len(self.normalized_shape), 0))
        x = x * self.hold(torch.rsqrt(x.square().mean(axes, keepdim=True) + self.eps))
        if self.weight is None:
            return x
        return x * (self.weight.view(-1, *[1] * (x.ndim - 2)) if self.channels_first else self.weight)


class HeldRmsNorm2d(HeldRmsNorm):
    """RMS norm over the channels of (N, C, H, W)."""

    channels_first = True


def _by_rule_of(base: type[nn.Module]) -> Rule:
    return lambda module, conversion: conversion.by_rule_of(base, module)


def _norm_and_activation(base: type[nn.Module]) -> Rule:
    def rule(module: nn.Module, conversion: Conversion) -> nn.Module:
        drop, act = module.get_submodule("drop"), module.get_submodule("act")
        del module.drop, module.act
        norm = conversion.by_rule_of(base, module)
        return nn.Sequential(norm, conversion.child(drop, "drop"), conversion.child(act, "act"))

    return rule


@register_conversion(layers.LayerNorm2d)
def _layer_norm_2d(module: nn.Module, conversion: Conversion) -> nn.Module:
    return conversion.recast(conversion.by_rule_of(nn.LayerNorm, module), BcosLayerNorm2d)


register_conversion(layers.RmsNorm, layers.RmsNormFp32)(recast_to(HeldRmsNorm))
register_conversion(layers.RmsNorm2d, layers.norm.RmsNorm2dFp32)(recast_to(HeldRmsNorm2d))
for _base, _renamed, _with_activation in (  # base type, types that equal it, types that add an activation
    (nn.BatchNorm2d, (), (layers.BatchNormAct2d,)),
    (nn.GroupNorm, (layers.GroupNorm, layers.GroupNorm1, models.metaformer.GroupNorm1NoBias),
     (layers.GroupNormAct, layers.norm_act.GroupNorm1Act)),
    (nn.LayerNorm, (layers.LayerNorm, layers.LayerNormFp32, models.metaformer.LayerNormNoBias),
     (layers.LayerNormAct, layers.norm_act.LayerNormActFp32)),
    (layers.LayerNorm2d,
     (layers.LayerNorm2dFp32, layers.norm.LayerNormExp2d, models.metaformer.LayerNorm2dNoBias),
     (layers.LayerNormAct2d, layers.norm_act.LayerNormAct2dFp32)),
    (layers.RmsNorm, (), (layers.norm_act.RmsNormAct, layers.norm_act.RmsNormActFp32)),
    (layers.RmsNorm2d, (), (layers.norm_act.RmsNormAct2d, layers.norm_act.RmsNormAct2dFp32)),
):  # fmt: skip
    register_conversion(*_renamed)(_by_rule_of(_base))
    register_conversion(*_with_activation)(_norm_and_activation(_base))


class HeldGlobalResponseNorm(Holdable, layers.grn.GlobalResponseNorm):
    """x + β + γ·x·n with n_c = ‖x_c‖ / mean_c ‖x_c‖, x_c channel c of an image; n can be held."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) or (N, C, H, W), as the layer was built, -> the same shape."""
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        relative = self.hold(norms / (norms.mean(self.channel_dim, keepdim=True) + self.eps))
        x = x + self.weight.view(self.wb_shape) * (x * relative)
        return x if self.bias is None else x + self.bias.view(self.wb_shape)


class LearnableAffine(models.hgnet.LearnableAffineBlock):
    """s·x + b; `bcosify` may have removed the bias b."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x if self.bias is None else self.scale * x + self.bias


class BcosConv2dSame(BcosConv2d):
    """B-cos convolution with TensorFlow's `SAME` padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        return super().forward(pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)))


register_conversion(layers.grn.GlobalResponseNorm)(recast_to(HeldGlobalResponseNorm))
register_conversion(models.hgnet.LearnableAffineBlock)(recast_to(LearnableAffine))
register_conversion(layers.Linear)(_by_rule_of(nn.Linear))


@register_conversion(layers.Conv2dSame)
def _conv_same(module: nn.Module, conversion: Conversion) -> nn.Module:
    return conversion.recast(conversion.by_rule_of(nn.Conv2d, module), BcosConv2dSame)


@register_conversion(
    layers.StdConv2d, layers.StdConv2dSame, layers.ScaledStdConv2d, layers.ScaledStdConv2dSame
)
def _standardised_conv(module: layers.ScaledStdConv2d, conversion: Conversion) -> nn.Module:
    """Standardises the weight once, at conversion; the B-cos layer does not standardise in `forward`."""
    rows = module.weight.detach().flatten(1)
    rows = F.batch_norm(rows[None], None, None, training=True, momentum=0.0, eps=module.eps)[0]
    if hasattr(module, "gain"):
        rows = rows * (module.gain.detach().flatten(1) * module.scale)
        del module.gain
    module.weight = conversion.derived(module.weight, rows.view_as(module.weight))
    if getattr(module, "same_pad", False):
        return _conv_same(module, conversion)
    return conversion.by_rule_of(nn.Conv2d, module)


@register_conversion(layers.adaptive_avgmax_pool.FastAdaptiveAvgPool)
def _global_average(
    module: layers.adaptive_avgmax_pool.FastAdaptiveAvgPool, conversion: Conversion
) -> nn.Module:
    """Replaces a pool over H and W by `nn.AdaptiveAvgPool2d`, which `gap_reorder` expects."""
    channels_last = module.dim == (1, 2)
    if not channels_last and module.dim != (2, 3):
        return module
    steps: list[nn.Module] = [torchvision.ops.Permute([0, 3, 1, 2])] if channels_last else []
    steps.append(nn.AdaptiveAvgPool2d(1))
    if module.flatten:
        steps.append(nn.Flatten())
    elif channels_last:
        steps.append(torchvision.ops.Permute([0, 2, 3, 1]))
    return nn.Sequential(*steps)


# Activations x·g(x) -----------------------------------------------------------------------------------------


class GatedHardMish(Gate):
    """x·clip((x + 2)/2, 0, 1), timm's approximation of Mish."""

    activation, gate = staticmethod(layers.hard_mish), staticmethod(lambda x: 0.5 * (x + 2).clamp(0, 2))


class HeldStarReLU(Holdable, models.metaformer.StarReLU):
    """s·relu(x)² + b, as relu(x) times the gate s·relu(x)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        x = x * self.hold(self.scale * x)
        return x if self.bias is None else x + self.bias


for _gate, *_types in (
    (GatedSiLU, Swish, SwishMe),
    (GatedHardswish, HardSwish, HardSwishMe),
    (GatedGELU, GELU),
    (partial(GatedGELU, "tanh"), GELUTanh),
    (GatedQuickGELU, QuickGELU),
    (GatedMish, Mish, MishMe),
    (GatedHardMish, HardMish, HardMishMe),
    (GatedTanh, Tanh),
):
    register_conversion(*_types)(lambda module, conversion, gate=_gate: gate())


class HeldSquaredReLU(Holdable, models.metaformer.SquaredReLU):
    """relu(x)², as relu(x) times the gate relu(x)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return x * self.hold(x)


register_conversion(models.metaformer.StarReLU)(recast_to(HeldStarReLU))
register_conversion(models.metaformer.SquaredReLU)(recast_to(HeldSquaredReLU))


# Gates: layers that compute a gate stay ordinary ------------------------------------------------------------


class Factor(Holdable):
    """Wraps a module whose output is a factor, and holds that output in explanation mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.hold(self.module(x))


def _factor(name: str, converted: tuple[str, ...] = ()) -> Rule:
    """Returns a rule for a type whose child `name` outputs a factor and whose linear path is `converted`."""

    def rule(module: nn.Module, conversion: Conversion) -> nn.Module:
        setattr(module, name, Factor(getattr(module, name)))
        return conversion.children(module, converted)

    return rule


register_conversion(
    layers.SEModule, layers.EffectiveSEModule, layers.squeeze_excite.SqueezeExciteCl, layers.EcaModule,
    layers.CecaModule, layers.GatherExcite, layers.cbam.ChannelAttn, layers.cbam.SpatialAttn,
    layers.cbam.LightSpatialAttn, models._efficientnet_blocks.SqueezeExcite,
)(_factor("gate"))  # fmt: skip
register_conversion(models.hgnet.EseModule, models.senet.SEModule)(_factor("sigmoid"))
register_conversion(layers.cbam.LightChannelAttn)(_factor("fc2"))
register_conversion(layers.SelectiveKernel)(_factor("attn", ("paths",)))
register_conversion(layers.SplitAttn)(_factor("rsoftmax", ("conv", "bn0", "drop", "act0")))
register_conversion(layers.GluMlp)(_factor("act", ("fc1", "drop1", "norm", "fc2", "drop2")))
register_conversion(layers.SwiGLU)(_factor("act", ("fc1_x", "drop1", "norm", "fc2", "drop2")))
register_conversion(models.starnet.Block)(_factor("act", ("dwconv", "f2", "g", "dwconv2", "drop_path")))
register_conversion(models.mambaout.GatedConvBlock)(
    _factor("act", ("norm", "fc1", "conv", "fc2", "drop_path"))
)
register_conversion(models.mlp_mixer.SpatialGatingUnit)(_factor("proj"))

# Attention whose matrix passes through a child, which then holds it -----------------------------------------

# The projections to q, k and v stay linear, the output projection becomes B-cos.


class HeldDropout(Holdable, nn.Dropout):
    """Dropout of an attention matrix; its output can be held."""

    def forward(self, x: Tensor) -> Tensor:
        return self.hold(super().forward(x))


def _attention(original: type[nn.Module], *converted: str, through: str = "attn_drop") -> None:
    """Registers the rule of an attention module whose matrix passes through its child `through`.

    The output projection `proj` and the children `converted` (dotted: descendants) are on the linear path.
    """
    # fused attention has no matrix to hold, so it is off in explanation mode
    fused_unless_explained = property(lambda layer: getattr(layer, through).explanation is None)
    name = f"Held_{original.__module__.rpartition('.')[2]}_{original.__name__}"
    held = type(
        name,
        (original,),
        {"fused_attn": fused_unless_explained, "__module__": __name__, "__doc__": original.__doc__},
    )
    globals()[name] = held  # pickle looks classes up in their module

    @register_conversion(original)
    def rule(module: nn.Module, conversion: Conversion) -> nn.Module:
        matrix = getattr(module, through)
        setattr(
            module,
            through,
            conversion.recast(matrix, HeldDropout) if isinstance(matrix, nn.Dropout) else Factor(matrix),
        )
        gate = getattr(module, "gate", None)
        if gate is not None:
            module.gate = Factor(gate)
        conversion.children(module, ("proj", "proj_drop", *converted))
        return conversion.recast(module, held) if getattr(module, "fused_attn", False) else module


_attention(layers.Attention, "norm")
_attention(layers.AttentionRope, "norm")
_attention(layers.MultiQueryAttention2d, "value.norm", "output")
_attention(models.davit.WindowAttention, through="softmax")
_attention(models.eva.EvaAttention, "norm")
_attention(models.nextvit.EfficientAttention, "sr", "norm")
_attention(models.pvt_v2.Attention, "pool", "sr", "norm", "act")
_attention(models.twins.GlobalSubSampleAttn, "sr", "norm")
_type: type[nn.Module]
for _type in (
    layers.attention2d.Attention2d, models.beit.Attention, models.cait.ClassAttn, models.cait.TalkingHeadAttn,
    models.convit.GPSA, models.convit.MHSA, models.crossvit.CrossAttention,
    models.edgenext.CrossCovarianceAttn, models.fastvit.Attention, models.gcvit.WindowAttentionGlobal,
    models.maxxvit.Attention2d, models.maxxvit.AttentionCl, models.metaformer.Attention,
    models.nest.Attention, models.swin_transformer.WindowAttention,
    models.swin_transformer_v2.WindowAttention, models.swin_transformer_v2_cr.WindowMultiHeadAttention,
    models.tnt.Attention, models.twins.LocallyGroupedAttn, models.vision_transformer_relpos.RelPosAttention,
    models.vision_transformer_sam.Attention, models.visformer.Attention, models.volo.Attention,
    models.volo.ClassAttention, models.volo.OutlookAttention, models.xcit.XCA,
):  # fmt: skip
    _attention(_type)


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
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)
        )  # (N, heads, D, L)
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


# Refused types: converting just their children would miss the factors that their `forward` computes.
@register_conversion(
    layers.attention2d.MultiQueryAttentionV2, layers.attention_pool.AttentionPoolPrr, layers.AttentionPool2d,
    layers.RotAttentionPool2d, layers.bottleneck_attn.BottleneckAttn, layers.coord_attn.CoordAttn,
    layers.coord_attn.EfficientLocalAttn, layers.coord_attn.SimpleCoordAttn, layers.coord_attn.StripAttn,
    layers.diff_attention.DiffAttention, layers.GlobalContext, layers.halo_attn.HaloAttn,
    layers.lambda_layer.LambdaLayer, layers.non_local_attn.BilinearAttnTransform, layers.NonLocalAttn,
    layers.other_pool.SimPool1d, layers.other_pool.SimPool2d, models._efficientnet_blocks.CondConvResidual,
    models.coat.FactorAttnConvRelPosEnc, models.coat.ConvRelPosEnc, models.cpubone.ConvAttention,
    models.davit.ChannelAttentionV2, models.efficientvim.EfficientViMBlock, models.efficientvim.HSMSSD,
    models.efficientvit_mit.LiteMLA, models.efficientvit_msra.CascadedGroupAttention,
    models.focalnet.FocalModulation, models.gemma4_vit.Gemma4Attention, models.gemma4_vit.Gemma4GatedMlp,
    models.ghostnet.GhostModuleV2, models.ghostnet.GhostModuleV3, models.hiera.MaskUnitAttention,
    models.hieradet_sam2.MultiScaleAttention, models.iformer.SHMA, models.lowformer.ConvAttention,
    models.mobilevit.LinearSelfAttention, models.mvitv2.MultiScaleAttention,
    models.mvitv2.MultiScaleAttentionPoolFirst, models.shvit.SHSA,
    models.swiftformer.EfficientAdditiveAttention, models.vision_transformer.ParallelScalingBlock,
    models.vision_transformer.DiffParallelScalingBlock, models.vitamin.GeGluMlp,
)  # fmt: skip
def _refused(module: nn.Module, conversion: Conversion) -> nn.Module:
    name = type(module).__name__
    raise ConversionError(
        f"no conversion rule for {name} at {conversion.path!r} "
        "(its forward multiplies functions of the input, which nothing holds): "
        f"write one with @register_conversion({name})"
    )
