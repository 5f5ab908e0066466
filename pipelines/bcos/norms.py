"""Normalisation layers whose factor 1/sqrt(var + ε) can be held.

Only this factor makes a norm non-linear: centring is linear in the input, so that LayerNorm and GroupNorm
keep it. `convert` replaces torch's norms by these layers; it moves a BatchNorm's running mean into its bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.explanation import Holdable
from pipelines.bcos.fused import batch_statistics, uncentered_norm
from pipelines.bcos.precision import widened


class BcosBatchNorm(Holdable):
    """Uncentred BatchNorm of (N, C, H, W) or (N, C): y = γ·x/sqrt(var + ε) + β.

    var is the ordinary, centred variance of the batch, or the running variance in evaluation mode. Only the
    subtraction of the mean is gone; `centered=True` keeps it. Unlike torch's BatchNorm, the running variance
    follows the biased batch variance.

    Source: Arya et al., B-cosification, NeurIPS 2024, section 3.2.
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
        shape = (1, -1) + (1,) * (x.ndim - 2)
        axes = [0, *range(2, x.ndim)]
        weight = None if self.weight is None else self.weight.view(shape)
        shift = None if self.bias is None else self.bias.view(shape)
        explanation = self.explanation
        fused = explanation is None or explanation.fused
        if self.training and fused and weight is not None and not self.centered:
            y, mean, var = uncentered_norm(x, weight, self.eps, axes, explanation)
            self.observe(self._track, mean, var)
            return y if shift is None else (y + shift).to(x.dtype)
        if self.training:
            mean, var = batch_statistics(x, axes)
            self.observe(self._track, mean, var)
        else:
            mean, var = self.running_mean, self.running_var.view(shape)  # type: ignore[assignment]
        scale = self.hold(torch.rsqrt(var + self.eps))
        scale = scale if weight is None else scale * weight
        if self.centered:
            centring = mean.view(shape) * scale
            shift = -centring if shift is None else shift - centring
        return (x * scale if shift is None else torch.addcmul(shift, widened(x), scale)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Updates the running statistics: exponential average, or plain average if `momentum` is `None`."""
        self.num_batches_tracked += 1
        step = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_var.lerp_(var.flatten().to(self.running_var.dtype), step)
        if self.running_mean is not None:
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), step)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, centered={self.centered}"


class BcosLayerNorm(Holdable, nn.LayerNorm):
    """`nn.LayerNorm` over the last dimensions of (..., *normalized_shape); 1/sqrt(var + ε) can be held."""

    def forward(self, x: Tensor) -> Tensor:
        if self.explanation is None:
            return super().forward(x)
        axes = tuple(range(-len(self.normalized_shape), 0))
        wide, dtype = widened(x), x.dtype
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        x = (wide - mean) * self.hold(torch.rsqrt(var + self.eps))
        x = x if self.weight is None else x * self.weight
        return (x if self.bias is None else x + self.bias).to(dtype)


class BcosLayerNorm2d(BcosLayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BcosGroupNorm(Holdable, nn.GroupNorm):
    """`nn.GroupNorm` of (N, C, ...); 1/sqrt(var + ε) can be held."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.explanation is None:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        grouped, dtype = widened(x).unflatten(1, (self.num_groups, -1)), x.dtype
        axes = tuple(range(2, grouped.ndim))
        var, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
        x = ((grouped - mean) * self.hold(torch.rsqrt(var + self.eps))).flatten(1, 2)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        x = x if self.weight is None else x * self.weight.view(shape)
        return (x if self.bias is None else x + self.bias.view(shape)).to(dtype)
