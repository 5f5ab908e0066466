"""Conversion rules for torchvision's block types whose forward passes are not modules alone, and for the CIFAR ResNets."""

from __future__ import annotations

import torchvision
from torch import nn

from pipelines.bcos import Context, register_conversion
from pipelines.models.cifar import PadShortcut


@register_conversion(PadShortcut, torchvision.ops.Permute, torchvision.ops.StochasticDepth)
def _linear_as_it_is(module: nn.Module, context: Context) -> nn.Module:
    return module


@register_conversion(torchvision.models.DenseNet)
def _densenet(module: torchvision.models.DenseNet, context: Context) -> nn.Module:
    """Its last ReLU and global pool are functions; here they are modules."""
    return nn.Sequential(
        context.child(module.features, "features"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        context.child(module.classifier, "classifier"),
    )
