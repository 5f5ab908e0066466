"""Activations and the average pool in B-cos networks.

Gated activations x·g(x), such as GELU, have an input-dependent gate g that can be held. ReLU is piecewise
linear and the average pool is linear, so they hold nothing. If a loss on W(x) differentiates their gradients,
autograd adds zeros of the size of the layer's input, which `fused.relu` and `fused.average_pool` avoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos import fused
from pipelines.bcos.explanation import Explainable, Holdable


class Gate(Holdable):
    """Base class of gated activations x·g(x); any shape -> the same.

    Subclasses define `activation`, torch's own function, which runs outside explanation mode, and `gate`, the
    gate g.
    """

    activation: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) if self.explanation is None else x * self.hold(self.gate(x))


class GatedSiLU(Gate):
    """SiLU as x·sigmoid(x)."""

    activation, gate = staticmethod(F.silu), staticmethod(torch.sigmoid)


class GatedHardswish(Gate):
    """Hardswish as x·clip((x + 3)/6, 0, 1)."""

    activation, gate = staticmethod(F.hardswish), staticmethod(F.hardsigmoid)


class GatedMish(Gate):
    """Mish as x·tanh(softplus(x))."""

    activation, gate = staticmethod(F.mish), staticmethod(lambda x: F.softplus(x).tanh())


class GatedReLU6(Gate):
    """ReLU6 as x·g(x), with g = 0 below 0, g = 1 up to 6 and g = 6/x above.

    As a clamp, it would be constant above 6, which adds a constant to the logits that no pixel carries.
    """

    activation, gate = staticmethod(F.relu6), staticmethod(lambda x: (x > 0) * (6 / x.clamp_min(6)))


class GatedTanh(Gate):
    """Tanh as x·(tanh(x)/x)."""

    activation = staticmethod(torch.tanh)

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        """tanh(x)/x in (0, 1]. Near 0 a series replaces the quotient, whose derivative would cancel there."""
        small = x.abs() < 1e-2
        divisor = torch.where(small, 1.0, x)
        square = x * x
        return torch.where(small, 1 - square / 3 * (1 - square * 0.4), torch.tanh(divisor) / divisor)


class GatedGELU(Gate):
    """GELU as x·Φ(x), exact or by the tanh approximation."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def gate(self, x: Tensor) -> Tensor:
        """Φ(x), in [0, 1]."""
        if self.approximate == "tanh":
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


class GatedQuickGELU(Gate):
    """x·sigmoid(1.702·x), which approximates GELU."""

    activation, gate = (
        staticmethod(lambda x: x * torch.sigmoid(1.702 * x)),
        staticmethod(lambda x: torch.sigmoid(1.702 * x)),
    )


class BcosReLU(Explainable, nn.ReLU):
    """`nn.ReLU`, whose gradient is cheap to differentiate in explanation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.explanation is None or not self.explanation.fused else fused.relu(x)


class BcosAvgPool2d(Explainable, nn.AvgPool2d):
    """`nn.AvgPool2d`, whose gradient is cheap to differentiate in explanation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.explanation is None or not self.explanation.fused:
            return super().forward(x)
        kernel, stride, padding = (
            [value, value] if isinstance(value, int) else list(value)
            for value in (self.kernel_size, self.stride, self.padding)
        )
        return fused.average_pool(
            x, kernel, stride, padding, self.ceil_mode, self.count_include_pad, self.divisor_override
        )
