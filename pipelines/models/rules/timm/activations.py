"""timm's activations, as products x·g(x) whose gate g can be held."""

from __future__ import annotations

from functools import partial

import timm.layers
import timm.models
from timm.layers.activations import GELU, GELUTanh, HardMish, HardSwish, Mish, QuickGELU, Swish, Tanh
from timm.layers.activations_me import HardMishMe, HardSwishMe, MishMe, SwishMe
from torch import Tensor

from pipelines.bcos import Holdable, register_conversion
from pipelines.bcos.activations import (
    Gate,
    GatedGELU,
    GatedHardswish,
    GatedMish,
    GatedQuickGELU,
    GatedSiLU,
    GatedTanh,
)
from pipelines.bcos.convert import recast_to

layers, models = timm.layers, timm.models


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
