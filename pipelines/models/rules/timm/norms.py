"""timm's norms, with and without an activation behind them.

N images, C channels, H × W places.
"""

from __future__ import annotations

import timm.layers
import timm.models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos import Conversion, Holdable, register_conversion
from pipelines.bcos.convert import Rule, recast_to
from pipelines.bcos.norms import BcosLayerNorm2d

layers, models = timm.layers, timm.models


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


def by_rule_of(base: type[nn.Module]) -> Rule:
    """Returns the rule of types that only rename or extend `base`: that of `base`."""
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
    register_conversion(*_renamed)(by_rule_of(_base))
    register_conversion(*_with_activation)(_norm_and_activation(_base))


class HeldGlobalResponseNorm(Holdable, layers.grn.GlobalResponseNorm):
    """x + β + γ·x·n with n_c = ‖x_c‖ / mean_c ‖x_c‖, x_c channel c of an image; n can be held."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) or (N, C, H, W), as the layer was built, -> the same shape."""
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        relative = self.hold(norms / (norms.mean(self.channel_dim, keepdim=True) + self.eps))
        x = x + self.weight.view(self.wb_shape) * (x * relative)
        return x if self.bias is None else x + self.bias.view(self.wb_shape)


register_conversion(layers.grn.GlobalResponseNorm)(recast_to(HeldGlobalResponseNorm))
