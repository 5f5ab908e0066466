"""timm's gated blocks, such as squeeze-excitation: the child that outputs the gate is made to hold it.

The layers that compute the gate stay ordinary.
"""

from __future__ import annotations

import timm.layers
import timm.models
from torch import Tensor, nn

from pipelines.bcos import Conversion, Holdable, register_conversion
from pipelines.bcos.convert import Rule

layers, models = timm.layers, timm.models


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
