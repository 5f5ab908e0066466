"""Activations and the average pool in B-cos networks.

Gated activations x·g(x) have a gate g that can be held. The gradient of ReLU and of the average pool is linear in the incoming
gradient, so nothing is held. Where a loss on W(x) differentiates that gradient, autograd would add zeros of the size of the
layer's input; `fused.relu` and `fused.average_pool` tell it that there is no such gradient.
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
    """A gated activation x·g(x); subclasses say what torch's own `activation` and its `gate` g are."""

    activation: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same; outside explanation mode by torch's own fused activation."""
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
    """ReLU6 as x·g(x), g = 0 below 0, 1 up to 6, 6/x above: what it cuts off leaves no constant that no pixel carries."""

    activation, gate = staticmethod(F.relu6), staticmethod(lambda x: (x > 0) * (6 / x.clamp_min(6)))


class GatedTanh(Gate):
    """Tanh as x·(tanh(x)/x)."""

    activation = staticmethod(torch.tanh)

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        """tanh(x)/x in (0, 1], near 0 by its series, whose derivative does not cancel."""
        small = x.abs() < 1e-2
        divisor = torch.where(small, 1.0, x)
        square = x * x
        return torch.where(small, 1 - square / 3 * (1 - square * 0.4), torch.tanh(divisor) / divisor)


class GatedGELU(Gate):
    """GELU as x·Φ(x), exact or by its tanh approximation."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def activation(self, x: Tensor) -> Tensor:
        """x·Φ(x)."""
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
    """`nn.ReLU`; in a B-cos network its gradient is cheap to differentiate."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return super().forward(x) if self.explanation is None or not self.explanation.fused else fused.relu(x)


class BcosAvgPool2d(Explainable, nn.AvgPool2d):
    """`nn.AvgPool2d`; in a B-cos network its gradient is cheap to differentiate."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if self.explanation is None or not self.explanation.fused:
            return super().forward(x)
        kernel, stride, padding = (
            [value, value] if isinstance(value, int) else list(value)
            for value in (self.kernel_size, self.stride, self.padding)
        )
        return fused.average_pool(
            x, kernel, stride, padding, self.ceil_mode, self.count_include_pad, self.divisor_override
        )
