"""ReLU and average pool, whose gradient is linear in what comes in. Nothing of them need be held.

Where a loss on W(x) differentiates that gradient, autograd adds zeros of the size of their input for the way through it. Here it
is told that there is none, which saves two passes over an activation each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.hold import Explainable


class _ReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, output.detach(), 0)


class _AveragePool(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_NCHW: Tensor, options: tuple[Any, ...]) -> Tensor:
        return F.avg_pool2d(x_NCHW, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[Any, ...]], output: Tensor) -> None:
        x_NCHW, ctx.options = inputs
        ctx.save_for_backward(x_NCHW)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x_NCHW,) = ctx.saved_tensors
        return torch.ops.aten.avg_pool2d_backward(gradient, x_NCHW.detach(), *ctx.options), None


class BcosReLU(Explainable, nn.ReLU):
    """`nn.ReLU`; in a B-cos network its gradient is cheap to differentiate."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return super().forward(x) if self.explanation is None or not self.explanation.fused else _ReLU.apply(x)


class BcosAvgPool2d(Explainable, nn.AvgPool2d):
    """`nn.AvgPool2d`; in a B-cos network its gradient is cheap to differentiate."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if self.explanation is None or not self.explanation.fused:
            return super().forward(x)
        kernel, stride, padding = (
            [value, value] if isinstance(value, int) else list(value) for value in (self.kernel_size, self.stride, self.padding)
        )
        return _AveragePool.apply(x, (kernel, stride, padding, self.ceil_mode, self.count_include_pad, self.divisor_override))
