"""Normalisation layers and gates whose input-dependent factor can be held.

A norm's factor is 1/sqrt(var + eps); its centring is linear in the input and stays. A gated activation x·g(x) has the factor g.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.hold import Holdable


class BcosBatchNorm(Holdable):
    """BatchNorm of (N, C, H, W) or (N, C), as B-cos networks use it.

    Uncentred (the default): y = γ·x/sqrt(var + eps) + β, where var is the ordinary, centred variance of the batch (in evaluation
    mode, the running one); only the subtraction of the mean is gone. `centered=True` keeps that too. The running variance takes
    the biased batch variance, unlike torch's own. Source: Arya et al., B-cosification, 2024, section 3.2.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        centered: bool = False,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.centered = num_features, eps, momentum, centered
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if bias else None)
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features) if centered else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        if self.training:
            axes = [0, *range(2, x.ndim)]
            var, mean = torch.var_mean(x, axes, correction=0)
            self._track(var.detach(), mean.detach())
        else:
            var, mean = self.running_var, self.running_mean  # type: ignore[assignment]
        scale = self.hold(torch.rsqrt(var + self.eps))
        if self.weight is not None:
            scale = scale * self.weight
        shift: Tensor | None = self.bias
        if self.centered:
            shift = -mean * scale if shift is None else shift - mean * scale
        x = x * scale.view(shape)
        return x if shift is None else x + shift.view(shape)

    @torch.no_grad()
    def _track(self, var: Tensor, mean: Tensor) -> None:
        """Moves the running statistics towards the batch's; without a momentum, to their plain average."""
        self.num_batches_tracked += 1
        step = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_var.lerp_(var.to(self.running_var.dtype), step)
        if self.running_mean is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, centered={self.centered}"


class BcosLayerNorm(Holdable, nn.LayerNorm):
    """`nn.LayerNorm` over the last dimensions, with a variance that can be held."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) -> the same."""
        if self.explanation is None:
            return super().forward(x)
        axes = tuple(range(-len(self.normalized_shape), 0))
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        x = (x - mean) * self.hold(torch.rsqrt(var + self.eps))
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


class BcosGroupNorm(Holdable, nn.GroupNorm):
    """`nn.GroupNorm` of (N, C, ...), with a variance that can be held."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same."""
        if self.explanation is None:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        grouped = x.unflatten(1, (self.num_groups, -1))
        axes = tuple(range(2, grouped.ndim))
        var, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
        x = ((grouped - mean) * self.hold(torch.rsqrt(var + self.eps))).flatten(1, 2)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        x = x if self.weight is None else x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


class Gate(Holdable):
    """A gated activation x·g(x); its subclasses say what g is."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def gate(self, x: Tensor) -> Tensor:
        """g(x), of the shape of x."""
        raise TypeError(f"{type(self).__name__} does not say what its gate is")

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same; outside explanation mode by torch's own fused activation."""
        return self.activation(x) if self.explanation is None else x * self.hold(self.gate(x))


class GatedGELU(Gate):
    """GELU as x·Φ(x), exact or by its tanh approximation."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__(lambda x: F.gelu(x, approximate=approximate))
        self.approximate = approximate

    def gate(self, x: Tensor) -> Tensor:
        """Φ(x), in [0, 1]."""
        if self.approximate == "tanh":
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


class GatedSiLU(Gate):
    """SiLU as x·sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__(F.silu)

    def gate(self, x: Tensor) -> Tensor:
        """sigmoid(x), in [0, 1]."""
        return torch.sigmoid(x)


class GatedHardswish(Gate):
    """Hardswish as x·clip((x + 3)/6, 0, 1)."""

    def __init__(self) -> None:
        super().__init__(F.hardswish)

    def gate(self, x: Tensor) -> Tensor:
        """clip((x + 3)/6, 0, 1)."""
        return F.hardsigmoid(x)
