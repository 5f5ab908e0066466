"""Conversion rules for torchvision's module types, and for the shortcut of the CIFAR ResNets.

Only types whose forward pass does more than call children need a rule. Layers that only compute a factor stay
as they are: the fully connected layers of a squeeze-excitation, the projections to q and k, the network of
Swin v2's position biases. W(x) takes factors as constants, so these layers have no part in it.

N images, C channels, H × W places of a map or image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import convnext, maxvit, swin_transformer, vision_transformer
from torchvision.models.googlenet import BasicConv2d as GoogLeNetConv
from torchvision.models.inception import BasicConv2d as InceptionConv
from torchvision.ops import SqueezeExcitation

from pipelines.bcos import Conversion, Holdable, attend, register_conversion
from pipelines.bcos.convert import convert_children, keep
from pipelines.bcos.norms import BcosLayerNorm2d
from pipelines.models.cifar import PadShortcut

register_conversion(
    PadShortcut, torchvision.ops.Permute, torchvision.ops.StochasticDepth,
    maxvit.SwapAxes, maxvit.WindowPartition, maxvit.WindowDepartition,
)(keep)  # fmt: skip
# Linear in their children's outputs: a layer scale multiplies, class token and position embeddings are added.
register_conversion(convnext.CNBlock, vision_transformer.VisionTransformer, vision_transformer.Encoder)(
    convert_children
)


# Networks whose pools and activations are functions: here they are modules ----------------------------------


def _in_order(
    module: nn.Module, conversion: Conversion, *steps: str | tuple[str, nn.Module]
) -> nn.Sequential:
    """A sequence of `steps`: names of children, which are converted, or pairs (name, new module)."""
    sequence = nn.Sequential()
    for step in steps:
        name, part = (step, conversion.child(getattr(module, step), step)) if isinstance(step, str) else step
        sequence.add_module(name, part)
    return sequence


def _pool() -> list[tuple[str, nn.Module]]:
    return [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]


@register_conversion(torchvision.models.DenseNet)
def _densenet(module: torchvision.models.DenseNet, conversion: Conversion) -> nn.Module:
    return _in_order(module, conversion, "features", ("relu", nn.ReLU()), *_pool(), "classifier")


@register_conversion(torchvision.models.MobileNetV2)
def _mobilenet_v2(module: torchvision.models.MobileNetV2, conversion: Conversion) -> nn.Module:
    return _in_order(module, conversion, "features", *_pool(), "classifier")


@register_conversion(torchvision.models.MNASNet)
def _mnasnet(module: torchvision.models.MNASNet, conversion: Conversion) -> nn.Module:
    return _in_order(module, conversion, "layers", *_pool(), "classifier")


@register_conversion(torchvision.models.ShuffleNetV2)
def _shufflenet(module: torchvision.models.ShuffleNetV2, conversion: Conversion) -> nn.Module:
    return _in_order(
        module, conversion, "conv1", "maxpool", "stage2", "stage3", "stage4", "conv5", *_pool(), "fc"
    )


@register_conversion(GoogLeNetConv, InceptionConv)
def _basic_conv(module: nn.Module, conversion: Conversion) -> nn.Module:
    return _in_order(module, conversion, "conv", "bn", ("relu", nn.ReLU(inplace=True)))


# GoogLeNet and Inception: one output, six input channels ----------------------------------------------------


class _SixChannels(nn.Module):
    """Changes the normalisation of z and -z, as `_transform_input` changes that of z in the original.

    z is the normalised RGB image; a B-cos network sees both.

    The shift is a constant that no pixel carries. `transform_input = False` in the original and mean and std
    of 0.5 in the conversion give the same function without it.
    """

    transform_input: bool

    def _transform_input(self, x: Tensor) -> Tensor:
        if not self.transform_input:
            return x
        scale, shift = (
            x.new_tensor([0.229, 0.224, 0.225]) / 0.5,
            (x.new_tensor([0.485, 0.456, 0.406]) - 0.5) / 0.5,
        )
        return x * torch.cat([scale, scale])[:, None, None] + torch.cat([shift, -shift])[:, None, None]


class _GoogLeNet(_SixChannels, torchvision.models.GoogLeNet):
    pass


class _Inception3(_SixChannels, torchvision.models.Inception3):
    pass


@register_conversion(torchvision.models.GoogLeNet)
def _googlenet(module: torchvision.models.GoogLeNet, conversion: Conversion) -> nn.Module:
    module.aux_logits, module.aux1, module.aux2 = False, None, None  # models here have one output
    return conversion.recast(conversion.children(module), _GoogLeNet)


@register_conversion(torchvision.models.Inception3)
def _inception(module: torchvision.models.Inception3, conversion: Conversion) -> nn.Module:
    module.aux_logits, module.AuxLogits = False, None
    return conversion.recast(conversion.children(module), _Inception3)


# Squeeze-excitation and LayerNorm ---------------------------------------------------------------------------


class _GlobalMean(nn.Module):
    """Pool of a squeeze-excitation; its type tells `gap_reorder` that it is not the network's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class _SqueezeExcitation(Holdable, SqueezeExcitation):
    def forward(self, input: Tensor) -> Tensor:
        return input * self.hold(self._scale(input))  # type: ignore[operator]


@register_conversion(SqueezeExcitation)
def _squeeze_excitation(module: SqueezeExcitation, conversion: Conversion) -> nn.Module:
    module.avgpool = _GlobalMean()
    return conversion.recast(module, _SqueezeExcitation)


@register_conversion(convnext.LayerNorm2d)
def _layer_norm_2d(module: convnext.LayerNorm2d, conversion: Conversion) -> nn.Module:
    return conversion.recast(conversion.by_rule_of(nn.LayerNorm, module), BcosLayerNorm2d)


# Attention in windows ---------------------------------------------------------------------------------------


def _to_windows(x_NHWC: Tensor, size: list[int]) -> Tensor:
    """(N, H, W, C) -> (N·windows, places per window, C)."""
    x = x_NHWC.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(windows: Tensor, size: list[int], height: int, width: int) -> Tensor:
    """Inverse of `_to_windows`: (N·windows, places per window, C) -> (N, height, width, C)."""
    x = windows.unflatten(1, size).unflatten(0, (-1, height // size[0], width // size[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _across_the_edge(x_NHWC: Tensor, size: list[int], shift: list[int]) -> Tensor:
    """Attention bias (windows, places, places): -100 between places from opposite edges of the map.

    The cyclic shift brings such places into one window. All other pairs have bias 0.
    """
    regions = []
    for axis in (0, 1):
        length = x_NHWC.shape[1 + axis]
        place = torch.arange(length, device=x_NHWC.device)
        regions.append((place >= length - size[axis]).long() + (place >= length - shift[axis]).long())
    region = 3 * regions[0][:, None] + regions[1]
    windows = _to_windows(region[None, :, :, None], size).squeeze(-1)
    return (windows[:, :, None] != windows[:, None, :]).to(x_NHWC.dtype) * -100.0


class _ShiftedWindows(Holdable):
    """Attention of Swin v1 and v2 in shifted windows, with the attention matrix held."""

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Module
    logit_scale: Tensor | None  # for v2, whose attention logits are scaled cosines

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        height, width = x.shape[1:3]
        size = self.window_size
        x = F.pad(x, (0, 0, 0, -width % size[1], 0, -height % size[0]))
        padded = x.shape[1:3]
        shift = [
            0 if window >= side else by
            for window, side, by in zip(size, padded, self.shift_size, strict=True)
        ]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        bias = self.get_relative_position_bias()  # type: ignore[operator]
        windows = _to_windows(x, size)
        if any(shift):
            bias = bias + _across_the_edge(x, size, shift)[:, None]
            bias = bias.repeat(len(windows) // len(bias), 1, 1, 1)
        mixed = F.dropout(self.proj(self._attention(windows, bias)), self.dropout, self.training)
        x = _from_windows(mixed, size, *padded)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _attention(self, windows: Tensor, bias: Tensor) -> Tensor:
        """(windows, places, C) -> (windows, places, C), before the output projection."""
        qkv_bias, scale = self.qkv.bias, None
        if self.logit_scale is not None and qkv_bias is not None:  # v2 sets the bias of k to 0
            q_bias, k_bias, v_bias = qkv_bias.chunk(3)
            qkv_bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])  # type: ignore[assignment]
        qkv = F.linear(windows, self.qkv.weight, qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.logit_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return (
            attend(self, q, k, v, bias=bias, scale=scale, dropout=self.attention_dropout)
            .transpose(1, 2)
            .flatten(2)
        )


class _ShiftedWindowAttention(_ShiftedWindows, swin_transformer.ShiftedWindowAttention):
    logit_scale = None


class _ShiftedWindowAttentionV2(_ShiftedWindows, swin_transformer.ShiftedWindowAttentionV2):
    pass


@register_conversion(swin_transformer.ShiftedWindowAttention, swin_transformer.ShiftedWindowAttentionV2)
def _shifted_windows(module: swin_transformer.ShiftedWindowAttention, conversion: Conversion) -> nn.Module:
    v2 = isinstance(module, swin_transformer.ShiftedWindowAttentionV2)
    return conversion.recast(
        conversion.children(module, ["proj"]), _ShiftedWindowAttentionV2 if v2 else _ShiftedWindowAttention
    )


class _RelativeAttention(Holdable, maxvit.RelativePositionalMultiHeadAttention):
    """MaxViT's attention, with the attention matrix held."""

    to_qkv: nn.Linear
    merge: nn.Module
    scale_factor: float

    def forward(self, x: Tensor) -> Tensor:
        """(N, groups, places, C) -> (N, groups, places, C)."""
        q, k, v = (
            self.to_qkv(x.flatten(0, 1))
            .unflatten(-1, (3, self.n_heads, self.head_dim))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = attend(self, q, k, v, bias=self.get_relative_positional_bias(), scale=self.scale_factor)  # type: ignore[operator]
        return self.merge(mixed.transpose(1, 2).flatten(2)).view_as(x)


@register_conversion(maxvit.RelativePositionalMultiHeadAttention)
def _relative_attention(
    module: maxvit.RelativePositionalMultiHeadAttention, conversion: Conversion
) -> nn.Module:
    return conversion.recast(conversion.children(module, ["merge"]), _RelativeAttention)
