"""Autograd functions and compiler settings that make B-cos networks fast.

Each function computes the formula of its layer (`layers`, `norms`, `activations`), to the same bits. Its
gradients take fewer passes over the activations than autograd's. If a loss on W(x) differentiates these
gradients, autograd's own formulas would save more tensors, add zeros of the size of an activation, or take
the slower of two equivalent convolutions.

Suffixes of names give the layout: N images, C channels, H x W locations. `linear` is l = w·x, g an incoming
gradient, `d_name` the gradient with respect to `name`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from pipelines.bcos.explanation import Explanation
from pipelines.bcos.precision import widened


class _Square(torch.autograd.Function):
    """|l|·l / norm, the layer at B = 2; saves l and norm, one activation where autograd saves three.

    Multiplies in the same order as the other branches of `_Bcos._scale`, so that all branches give the same
    bits. Otherwise the input of a later ReLU could be positive in one branch and negative in another.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, norm: Tensor) -> Tensor:
        return widened(linear).abs().mul_(norm.reciprocal()).mul_(linear).to(linear.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        linear, norm = ctx.saved_tensors
        graph = torch.is_grad_enabled()  # the caller differentiates this pass: nothing in place
        magnitude = widened(linear).abs()
        weighed = magnitude * gradient if graph else magnitude.mul_(gradient)
        d_norm = (
            -(weighed * linear).sum_to_size(norm.shape) / norm.square() if ctx.needs_input_grad[1] else None
        )
        twice = 2 / norm
        return (weighed * twice if graph else weighed.mul_(twice)).to(linear.dtype), d_norm


class _ExplainedSquare(torch.autograd.Function):
    """`_Square` with a second output, the factor |l| / norm, which is constant while `explanation` holds.

    The gradient of a held square is g·factor. If a loss differentiates this gradient, the factor has two
    gradients, one through the second output and one through the square. `backward` adds them and propagates
    the sum to l and norm once.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, norm: Tensor, explanation: Explanation) -> tuple[Tensor, Tensor]:
        factor = widened(linear).abs().mul_(norm.reciprocal())
        return (factor * linear).to(linear.dtype), factor

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Explanation], output: tuple[Tensor, Tensor]
    ) -> None:
        linear, norm, ctx.explanation = inputs
        ctx.save_for_backward(linear, norm, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, d_factor: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        linear, norm, factor = ctx.saved_tensors
        d_linear = None if gradient is None else gradient * factor
        if ctx.explanation.holds():
            return None if d_linear is None else d_linear.to(linear.dtype), None, None
        if gradient is not None:
            wide = widened(gradient)
            d_factor = wide * linear if d_factor is None else torch.addcmul(d_factor, wide, linear)
        if d_factor is None:
            return None, None, None
        graph = torch.is_grad_enabled()  # the caller differentiates this pass: nothing in place
        inverse, sign = norm.reciprocal(), widened(linear).sign()
        d_norm = -(d_factor * factor).sum_to_size(norm.shape) * inverse if ctx.needs_input_grad[1] else None
        slope = sign * inverse if graph else sign.mul_(inverse)  # ∂factor/∂linear
        of_factor = slope * d_factor if graph else slope.mul_(d_factor)
        d_linear = (
            of_factor if d_linear is None else d_linear + of_factor if graph else d_linear.add_(of_factor)
        )
        return d_linear.to(linear.dtype), d_norm, None


def square(linear: Tensor, norm: Tensor, explanation: Explanation | None) -> Tensor:
    """|linear|·linear / norm, the B-cos transformation at B = 2; `explanation` holds |linear| / norm."""
    return (
        _Square.apply(linear, norm)
        if explanation is None
        else _ExplainedSquare.apply(linear, norm, explanation)[0]
    )


class _SumOfSquares(torch.autograd.Function):
    """Σ_c x²: (N, C, H, W) -> (N, 1, H, W); the gradient takes one pass over x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_NCHW: Tensor, explanation: Explanation | None) -> Tensor:
        return widened(x_NCHW).square().sum(1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Explanation | None], output: Tensor) -> None:
        x_NCHW, explanation = inputs
        # at the entry no pass needs this gradient: that of W(x) holds the norm, and later ones end here
        ctx.at_entry = explanation is not None and x_NCHW is explanation.entry
        ctx.save_for_backward(x_NCHW)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if gradient is None or ctx.at_entry:
            return None, None
        (x_NCHW,) = ctx.saved_tensors
        return (x_NCHW * (2 * gradient)).to(x_NCHW.dtype), None


def sum_of_squares(x_NCHW: Tensor, explanation: Explanation | None) -> Tensor:
    """Σ_c x²: (N, C, H, W) -> (N, 1, H, W)."""
    return _SumOfSquares.apply(x_NCHW, explanation)


Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


class _Convolution(torch.autograd.Function):
    """A convolution whose input gradient, `_InputGradient`, is cheap to differentiate (losses on W(x))."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_NCHW: Tensor, weight: Tensor, geometry: Geometry, explanation: Explanation | None, at_entry: bool
    ) -> Tensor:
        return F.conv2d(x_NCHW, weight, None, *geometry)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Geometry, Explanation | None, bool], output: Tensor
    ) -> None:
        x_NCHW, weight, ctx.geometry, ctx.explanation, ctx.at_entry = inputs
        ctx.save_for_backward(x_NCHW, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_NCHW, weight = ctx.saved_tensors
        of_input, of_weight = ctx.needs_input_grad[:2]
        if ctx.explanation is not None:
            # needs_input_grad is also set for gradients that this pass does not use
            of_weight &= not ctx.explanation.of_input
            of_input &= ctx.explanation.of_input or not ctx.at_entry
        if not torch.is_grad_enabled():  # one call computes both, and converts g's memory layout once
            return (
                *_convolution_gradients(gradient, x_NCHW, weight, ctx.geometry, of_input, of_weight),
                None,
                None,
                None,
            )
        d_x = _InputGradient.apply(gradient, weight, x_NCHW.detach(), ctx.geometry) if of_input else None
        _, d_weight = _convolution_gradients(gradient, x_NCHW, weight, ctx.geometry, False, of_weight)
        return d_x, d_weight, None, None, None


class _InputGradient(torch.autograd.Function):
    """∂/∂x of g·conv(x, weight).

    Its own gradient with respect to the weight is computed as a convolution's weight gradient, in half the
    time of autograd's formula.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(g_NCHW: Tensor, weight: Tensor, x_NCHW: Tensor, geometry: Geometry) -> Tensor:
        d_x, _ = _convolution_gradients(g_NCHW, x_NCHW, weight, geometry, True, False)
        return d_x  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Geometry], output: Tensor) -> None:
        g_NCHW, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(g_NCHW, weight)

    @staticmethod
    def backward(ctx: Any, v_NCHW: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        g_NCHW, weight = ctx.saved_tensors
        of_g, of_weight = ctx.needs_input_grad[:2]
        d_g = F.conv2d(v_NCHW, weight, None, *ctx.geometry) if of_g else None
        _, d_weight = _convolution_gradients(g_NCHW, v_NCHW, weight, ctx.geometry, False, of_weight)
        return d_g, d_weight, None, None


def _convolution_gradients(
    g_NCHW: Tensor, x_NCHW: Tensor, weight: Tensor, geometry: Geometry, of_input: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """∂/∂x and ∂/∂weight of g·conv(x, weight), or `None` without `of_input` and `of_weight`, respectively.

    `torch.nn.grad` computes the same, but passes an expanded placeholder for the unused argument, which makes
    wide layers three times as slow on CPUs.
    """
    if not of_input and not of_weight:
        return None, None
    options = (*geometry[:3], False, (0, 0), geometry[3], (of_input, of_weight, False))
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(g_NCHW, x_NCHW, weight, None, *options)
    return d_x, d_weight


def convolution(
    x_NCHW: Tensor, weight: Tensor, geometry: Geometry, explanation: Explanation | None
) -> Tensor:
    """`F.conv2d`; if a loss on W(x) may follow, its input gradient is cheap to differentiate."""
    if explanation is None or explanation.detach:
        return F.conv2d(x_NCHW, weight, None, *geometry)
    if explanation.fused:
        return _cheaply_differentiable(x_NCHW, weight, geometry, explanation)
    return _traced_convolution(x_NCHW, weight, geometry)


def _cheaply_differentiable(
    x_NCHW: Tensor, weight: Tensor, geometry: Geometry, explanation: Explanation | None
) -> Tensor:
    """Calls `_Convolution`, with input and weight cast as autocast would cast them."""
    at_entry = explanation is not None and x_NCHW is explanation.entry
    if torch.is_autocast_enabled(x_NCHW.device.type):
        dtype = torch.get_autocast_dtype(x_NCHW.device.type)
        x_NCHW, weight = x_NCHW.to(dtype), weight.to(dtype)
    return _Convolution.apply(x_NCHW, weight, geometry, explanation, at_entry)


@torch.compiler.allow_in_graph  # the compiler must not trace inside, see `TracedExplanation.fused`
def _traced_convolution(x_NCHW: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return _cheaply_differentiable(x_NCHW, weight, geometry, None)


def batch_statistics(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `axes`, which are kept as axes of size 1.

    Two passes over x are many times faster than `torch.var_mean` on CPUs.
    """
    x = widened(x)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    squares = centred.square() if torch.is_grad_enabled() else centred.square_()
    return mean, squares.mean(axes, keepdim=True)


class _UncenteredNorm(torch.autograd.Function):
    """γ·x/sqrt(var + ε), mean and var of the batch; forward and backward take few passes over x.

    While `explanation` holds, the variance is constant, and the gradient g·γ/sqrt(var + ε) depends on the
    output `var`. If a loss differentiates this gradient, the variance has two gradients. `backward` adds them
    and propagates the sum to x once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, axes: list[int], explanation: Explanation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = batch_statistics(x, axes)
        ctx.eps, ctx.axes, ctx.explanation = eps, axes, explanation
        ctx.save_for_backward(x, weight, mean, var)
        ctx.set_materialize_grads(False)
        return (x * (weight * torch.rsqrt(var + eps))).to(x.dtype), mean, var

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, d_mean: Tensor | None, d_var: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, mean, var = ctx.saved_tensors
        inverse, count = torch.rsqrt(var + ctx.eps), x.numel() // x.shape[1]
        d_x = d_weight = None
        if gradient is not None:
            d_x = gradient * (weight * inverse)
            if ctx.explanation is None or not ctx.explanation.holds():
                d_scale = (widened(gradient) * x).sum(ctx.axes, keepdim=True)
                of_var = -0.5 * weight * inverse**3 * d_scale
                d_weight, d_var = d_scale * inverse, of_var if d_var is None else d_var + of_var
        if d_var is not None:
            centred, twice = x - mean, 2 / count * d_var  # a product is faster than a broadcasting addcmul
            of_x = centred * twice if torch.is_grad_enabled() else centred.mul_(twice)
            d_x = of_x if d_x is None else d_x.add_(of_x) if not torch.is_grad_enabled() else d_x + of_x
        if d_mean is not None:
            d_x = (d_mean / count).expand_as(x) if d_x is None else d_x + d_mean / count
        return None if d_x is None else d_x.to(x.dtype), d_weight, None, None, None


def uncentered_norm(
    x: Tensor, weight: Tensor, eps: float, axes: list[int], explanation: Explanation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """γ·x/sqrt(var + ε), mean and var of a batch over `axes`; `explanation` holds 1/sqrt(var + ε).

    Mean and var keep `axes` as axes of size 1; var is the biased variance.
    """
    return _UncenteredNorm.apply(x, weight, eps, axes, explanation)


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


def relu(x: Tensor) -> Tensor:
    """`F.relu`, whose gradient is not differentiated with respect to x again: that derivative is 0."""
    return _ReLU.apply(x)


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


def average_pool(x_NCHW: Tensor, *options: Any) -> Tensor:
    """`F.avg_pool2d`, whose gradient is not differentiated with respect to x again: that derivative is 0.

    `options` are the arguments of `F.avg_pool2d` in their order, with kernel, stride and padding as lists.
    """
    return _AveragePool.apply(x_NCHW, options)


def set_up_compiler() -> None:
    """Sets how torch.compile treats B-cos networks in this process."""
    torch._dynamo.config.optimize_ddp = False  # DDP's splitting of compiled graphs fails on B-cos layers
    # backward passes recompute factors and masks from the outputs of convolutions: faster than storing them
    torch._functorch.config.aggressive_recomputation = True
