"""Conversion rules for torchvision's block types whose forward passes are not modules alone, and for the CIFAR ResNets.

What computes a factor alone (the fully connected layers of a squeeze-excitation, the projections to q and k, the network of Swin
v2's position biases) stays as it is: nothing of the image flows through it linearly, so it has no row in W(x).
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
# Their own parameters are linear: a layer scale multiplies; a class token and position embeddings are constants.
register_conversion(convnext.CNBlock, vision_transformer.VisionTransformer, vision_transformer.Encoder)(
    convert_children
)


# Networks whose pools and activations are functions: here they are modules, under the names of the originals -----------


def _in_order(
    module: nn.Module, conversion: Conversion, *steps: str | tuple[str, nn.Module]
) -> nn.Sequential:
    """The network as a sequence: children by name, converted, and what stands in for functions, with a name each."""
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


# GoogLeNet and Inception: one output, six channels ---------------------------------------------------------------------


class _SixChannels(nn.Module):
    """Changes the normalisation of z and of -z alike, as the originals change that of z in their `_transform_input`.

    Its shift is a constant that no pixel carries. `transform_input = False` on the original, and a mean and deviation of 0.5 in
    the conversion, are the same without.
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
    """Its auxiliary classifiers served its own training; a network here has one output."""
    module.aux_logits, module.aux1, module.aux2 = False, None, None
    return conversion.recast(conversion.children(module), _GoogLeNet)


@register_conversion(torchvision.models.Inception3)
def _inception(module: torchvision.models.Inception3, conversion: Conversion) -> nn.Module:
    """As GoogLeNet."""
    module.aux_logits, module.AuxLogits = False, None
    return conversion.recast(conversion.children(module), _Inception3)


# Factors ---------------------------------------------------------------------------------------------------------------


class _GlobalMean(nn.Module):
    """The pool of a squeeze-excitation, which is no global pool of the network."""

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


# Attention in windows --------------------------------------------------------------------------------------------------


def _to_windows(x_NHWC: Tensor, size: list[int]) -> Tensor:
    """(N, H, W, C) -> (N·windows, places of a window, C)."""
    x = x_NHWC.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(windows: Tensor, size: list[int], height: int, width: int) -> Tensor:
    """The inverse of `_to_windows`: -> (N, height, width, C)."""
    x = windows.unflatten(1, size).unflatten(0, (-1, height // size[0], width // size[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _across_the_edge(x_NHWC: Tensor, size: list[int], shift: list[int]) -> Tensor:
    """-100 between places that a cyclic shift brought into one window from opposite edges, else 0: (windows, places, places)."""
    regions = []
    for axis in (0, 1):
        length = x_NHWC.shape[1 + axis]
        place = torch.arange(length, device=x_NHWC.device)
        regions.append((place >= length - size[axis]).long() + (place >= length - shift[axis]).long())
    region = 3 * regions[0][:, None] + regions[1]
    windows = _to_windows(region[None, :, :, None], size).squeeze(-1)
    return (windows[:, :, None] != windows[:, None, :]).to(x_NHWC.dtype) * -100.0


class _ShiftedWindows(Holdable):
    """Swin's attention: the forward pass of both versions, with the attention matrix held."""

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Module
    logit_scale: Tensor | None  # of v2, which compares directions

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
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
        """(windows, places, C) -> the same, before the projection."""
        qkv_bias, scale = self.qkv.bias, None
        if self.logit_scale is not None and qkv_bias is not None:  # v2 has no bias of k
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
    """MaxViT's attention, with its matrix held."""

    to_qkv: nn.Linear
    merge: nn.Module
    scale_factor: float

    def forward(self, x: Tensor) -> Tensor:
        """(N, groups, places, C) -> the same."""
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
