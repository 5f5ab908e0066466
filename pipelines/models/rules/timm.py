"""Conversion rules for timm's block types whose forward passes are not modules alone."""

from __future__ import annotations

import timm.layers
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from torch import nn

from pipelines.bcos import Context, register_conversion


@register_conversion(timm.layers.DropPath)
def _linear_as_it_is(module: nn.Module, context: Context) -> nn.Module:
    return module


@register_conversion(FastAdaptiveAvgPool)
def _fast_pool(module: FastAdaptiveAvgPool, context: Context) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten() if module.flatten else nn.Identity())


@register_conversion(timm.layers.BatchNormAct2d)
def _norm_and_activation(module: timm.layers.BatchNormAct2d, context: Context) -> nn.Module:
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
    norm.load_state_dict(module.state_dict())
    return nn.Sequential(context.child(norm, "norm"), context.child(module.drop, "drop"), context.child(module.act, "act"))
