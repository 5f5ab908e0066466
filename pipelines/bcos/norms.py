"""Normalisation layers whose factor 1/sqrt(var + eps) can be held; their centring is linear in the input and stays."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.hold import Explanation, Holdable
from pipelines.bcos.precision import widened


def _batch_statistics(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `axes`, kept; in two passes, which is many times faster than `torch.var_mean` on CPUs."""
    x = widened(x)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    squares = centred.square() if torch.is_grad_enabled() else centred.square_()
    return mean, squares.mean(axes, keepdim=True)


class _UncenteredNorm(torch.autograd.Function):
    """γ·x/sqrt(var(x) + ε) of the batch, in as few passes over x as its gradient allows; also its mean and variance.

    While `explanation` holds, the variance counts as constant.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, axes: list[int], explanation: Explanation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _batch_statistics(x, axes)
        ctx.eps, ctx.axes, ctx.explanation = eps, axes, explanation
        ctx.save_for_backward(x, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return (x * (weight * torch.rsqrt(var + eps))).to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, mean, var = ctx.saved_tensors
        if ctx.explanation is not None and ctx.explanation.holds():
            return _HeldScale.apply(gradient, x, weight, mean, var, ctx.eps, ctx.axes), None, None, None, None
        if torch.is_grad_enabled():  # a graph of this pass is wanted, through the statistics too
            mean, var = _batch_statistics(x, ctx.axes)
        inverse = torch.rsqrt(var + ctx.eps)
        d_scale = (widened(gradient) * x).sum(ctx.axes, keepdim=True)
        d_x = _through_variance(x, mean, weight, inverse, d_scale, gradient * (weight * inverse))
        return d_x.to(x.dtype), d_scale * inverse, None, None, None


class _HeldScale(torch.autograd.Function):
    """g·γ/sqrt(var(x) + ε), the gradient of `_UncenteredNorm` while its variance is held; its own goes through the variance."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, axes: list[int]) -> Tensor:
        ctx.eps, ctx.axes = eps, axes
        ctx.save_for_backward(g, x, weight, mean, var)
        return (g * (weight * torch.rsqrt(var + eps))).to(g.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean, var = _batch_statistics(x, ctx.axes)
        inverse = torch.rsqrt(var + ctx.eps)
        d_scale = (widened(v) * g).sum(ctx.axes, keepdim=True)
        d_x = _through_variance(x, mean, weight, inverse, d_scale).to(x.dtype)
        return (v * (weight * inverse)).to(g.dtype), d_x, d_scale * inverse, None, None, None, None


def _through_variance(
    x: Tensor, mean: Tensor, weight: Tensor, inverse: Tensor, d_scale: Tensor, more: Tensor | None = None
) -> Tensor:
    """The gradient that reaches x through var(x), from `d_scale` of the scale γ·inverse; with `more`, of x's shape, added."""
    of_var = -weight * inverse**3 * d_scale / (x.numel() // x.shape[1])
    centred = x - mean  # products beat a broadcasting addcmul
    if torch.is_grad_enabled():
        return centred * of_var if more is None else centred * of_var + more
    return centred.mul_(of_var) if more is None else centred.mul_(of_var).add_(more)


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
        axes = [0, *range(2, x.ndim)]
        weight = None if self.weight is None else self.weight.view(shape)
        shift = None if self.bias is None else self.bias.view(shape)
        explanation = self.explanation
        fused = explanation is None or explanation.fused
        if self.training and fused and weight is not None and not self.centered:
            y, mean, var = _UncenteredNorm.apply(x, weight, self.eps, axes, explanation)
            self.observe(self._track, mean, var)
            return y if shift is None else (y + shift).to(x.dtype)
        if self.training:
            mean, var = _batch_statistics(x, axes)
            self.observe(self._track, mean, var)
        else:
            mean, var = self.running_mean, self.running_var.view(shape)
        scale = self.hold(torch.rsqrt(var + self.eps))
        scale = scale if weight is None else scale * weight
        if self.centered:
            centring = mean.view(shape) * scale
            shift = -centring if shift is None else shift - centring
        return (x * scale if shift is None else torch.addcmul(shift, widened(x), scale)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics towards the batch's; without a momentum, to their plain average."""
        self.num_batches_tracked += 1
        step = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_var.lerp_(var.flatten().to(self.running_var.dtype), step)
        if self.running_mean is not None:
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), step)

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
        wide, dtype = widened(x), x.dtype
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        x = (wide - mean) * self.hold(torch.rsqrt(var + self.eps))
        x = x if self.weight is None else x * self.weight
        return (x if self.bias is None else x + self.bias).to(dtype)


class BcosGroupNorm(Holdable, nn.GroupNorm):
    """`nn.GroupNorm` of (N, C, ...), with a variance that can be held."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same."""
        if self.explanation is None:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        grouped, dtype = widened(x).unflatten(1, (self.num_groups, -1)), x.dtype
        axes = tuple(range(2, grouped.ndim))
        var, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
        x = ((grouped - mean) * self.hold(torch.rsqrt(var + self.eps))).flatten(1, 2)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        x = x if self.weight is None else x * self.weight.view(shape)
        return (x if self.bias is None else x + self.bias.view(shape)).to(dtype)
