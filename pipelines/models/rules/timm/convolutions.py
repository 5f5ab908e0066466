"""timm's convolutions, its linear layer and its global average pool.

N images, C channels, H × W places.
"""

from __future__ import annotations

import timm.layers
import torch.nn.functional as F
import torchvision
from timm.layers.padding import pad_same
from torch import Tensor, nn

from pipelines.bcos import BcosConv2d, Conversion, register_conversion
from pipelines.models.rules.timm.norms import by_rule_of

layers = timm.layers


class BcosConv2dSame(BcosConv2d):
    """B-cos convolution with TensorFlow's `SAME` padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        return super().forward(pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)))


register_conversion(layers.Linear)(by_rule_of(nn.Linear))


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
