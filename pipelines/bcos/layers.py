"""The B-cos transformation as a convolution and a linear layer.

    out = s^(B-1) · (w·x),   s = |w·x| / ‖x‖                      (Böhle et al., TPAMI 2024, eq. 3 and 4)

with ŵ = w/‖w‖ for w where `normalize_weight` is set (B-cos from scratch), w itself where not (B-cosified: Arya et al., 2024).
Layouts in names: N batch, C channels, G groups, M MaxOut units, HW places.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.explanation import Explanation, Holdable
from pipelines.bcos.precision import widened

PATCH_EPSILON = 1e-6  # in the root of a patch's norm
VECTOR_EPSILON = 1e-12  # beside a vector's norm
COSINE_EPSILON = 1e-6  # beside the cosine, for B other than 2

ExponentMode = Literal["fixed", "scheduled", "learned"]


def check_exponent(b: float) -> float:
    """`b` as a float; raises ValueError below 1."""
    if not b >= 1:
        raise ValueError(f"B must be at least 1, not {b}")
    return float(b)


def layer_b(model: nn.Module) -> dict[str, float]:
    """The exponent B of each B-cos layer of `model`, by the layer's name."""
    return {name: float(torch.as_tensor(layer.b).detach()) for name, layer in model.named_modules() if isinstance(layer, _Bcos)}


def set_b(model: nn.Module, b: float) -> None:
    """Sets the exponent of every B-cos layer of `model` whose B follows a schedule.

    Raises:
        ValueError: B below 1, or no such layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _Bcos) and layer.b_value is not None]
    if not layers:
        raise ValueError("this network has no B-cos layer whose B follows a schedule: bcosify it with b_mode='scheduled'")
    for layer in layers:
        layer.b_value.fill_(check_exponent(b))  # type: ignore[union-attr]


@torch.no_grad()
def clamp_b(model: nn.Module) -> None:
    """Sets every learned exponent of `model` that is below 1 to 1, where it has a gradient again."""
    for layer in model.modules():
        if isinstance(layer, _Bcos) and layer.b_offset is not None:
            layer.b_offset.clamp_(min=-1)


class _Square(torch.autograd.Function):
    """|l|·l / norm for B = 2, from l and norm alone: one activation is saved where autograd would save three.

    Products are taken in the order of the other ways of `_scale`, to the same bits: where these differ a ReLU behind a sum may
    open in one way and not in the other.
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
        graph = torch.is_grad_enabled()  # one of this very pass is wanted: then nothing in place
        magnitude = widened(linear).abs()
        weighed = magnitude * gradient if graph else magnitude.mul_(gradient)
        d_norm = -(weighed * linear).sum_to_size(norm.shape) / norm.square() if ctx.needs_input_grad[1] else None
        twice = 2 / norm
        return (weighed * twice if graph else weighed.mul_(twice)).to(linear.dtype), d_norm


class _ExplainedSquare(torch.autograd.Function):
    """`_Square`, and its factor |l| / norm, which counts as constant while `explanation` holds.

    The gradient of a held square is g times that output: where it is differentiated itself, the gradient that the factor then has
    and the one it has from the square meet here, and take one way to l and norm.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, norm: Tensor, explanation: Explanation) -> tuple[Tensor, Tensor]:
        factor = widened(linear).abs().mul_(norm.reciprocal())
        return (factor * linear).to(linear.dtype), factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Explanation], output: tuple[Tensor, Tensor]) -> None:
        linear, norm, ctx.explanation = inputs
        ctx.save_for_backward(linear, norm, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, d_factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        linear, norm, factor = ctx.saved_tensors
        d_linear = None if gradient is None else gradient * factor
        if ctx.explanation.holds():
            return None if d_linear is None else d_linear.to(linear.dtype), None, None
        if gradient is not None:
            wide = widened(gradient)
            d_factor = wide * linear if d_factor is None else torch.addcmul(d_factor, wide, linear)
        if d_factor is None:
            return None, None, None
        graph = torch.is_grad_enabled()  # one of this very pass is wanted: then nothing in place
        inverse, sign = norm.reciprocal(), widened(linear).sign()
        d_norm = -(d_factor * factor).sum_to_size(norm.shape) * inverse if ctx.needs_input_grad[1] else None
        slope = sign * inverse if graph else sign.mul_(inverse)  # of the factor by linear
        of_factor = slope * d_factor if graph else slope.mul_(d_factor)
        d_linear = of_factor if d_linear is None else d_linear + of_factor if graph else d_linear.add_(of_factor)
        return d_linear.to(linear.dtype), d_norm, None


class _SumOfSquares(torch.autograd.Function):
    """Σ_c x² over the channels, (N, C, H, W) -> (N, 1, H, W); its gradient takes one pass over x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_NCHW: Tensor, explanation: Explanation | None) -> Tensor:
        return widened(x_NCHW).square().sum(1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Explanation | None], output: Tensor) -> None:
        x_NCHW, explanation = inputs
        ctx.at_entry = explanation is not None and x_NCHW is explanation.entry  # a held norm has no gradient of the input
        ctx.save_for_backward(x_NCHW)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if gradient is None or ctx.at_entry:
            return None, None
        (x_NCHW,) = ctx.saved_tensors
        return (x_NCHW * (2 * gradient)).to(x_NCHW.dtype), None


Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


class _Convolution(torch.autograd.Function):
    """A convolution whose input gradient has `_InputGradient`'s own gradient, for losses on W(x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_NCHW: Tensor, weight: Tensor, geometry: Geometry, explanation: Explanation | None, at_entry: bool) -> Tensor:
        return F.conv2d(x_NCHW, weight, None, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Geometry, Explanation | None, bool], output: Tensor) -> None:
        x_NCHW, weight, ctx.geometry, ctx.explanation, ctx.at_entry = inputs
        ctx.save_for_backward(x_NCHW, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_NCHW, weight = ctx.saved_tensors
        of_input, of_weight = ctx.needs_input_grad[:2]
        if ctx.explanation is not None:  # autograd asks for all gradients that there are
            of_weight &= not ctx.explanation.of_input
            of_input &= ctx.explanation.of_input or not ctx.at_entry
        if not torch.is_grad_enabled():  # both by one call, which lays out the gradient once
            return *_convolution_gradients(gradient, x_NCHW, weight, ctx.geometry, of_input, of_weight), None, None, None
        d_x = _InputGradient.apply(gradient, weight, x_NCHW.detach(), ctx.geometry) if of_input else None
        _, d_weight = _convolution_gradients(gradient, x_NCHW, weight, ctx.geometry, False, of_weight)
        return d_x, d_weight, None, None, None


class _InputGradient(torch.autograd.Function):
    """∂/∂x of g·conv(x, weight). Its own gradient by the weight is a convolution's; autograd's formula takes twice the time."""

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
    """∂/∂x and ∂/∂weight of g·conv(x, weight), each if it is wanted.

    `torch.nn.grad` does the same, but from stand-ins of what it is not given: wide layers then take three times as long on CPUs.
    """
    if not of_input and not of_weight:
        return None, None
    options = (*geometry[:3], False, (0, 0), geometry[3], (of_input, of_weight, False))
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(g_NCHW, x_NCHW, weight, None, *options)
    return d_x, d_weight


def _convolution(x_NCHW: Tensor, weight: Tensor, geometry: Geometry, explanation: Explanation | None = None) -> Tensor:
    """`F.conv2d`, autocast too, whose input gradient is cheap to differentiate."""
    at_entry = explanation is not None and x_NCHW is explanation.entry
    if torch.is_autocast_enabled(x_NCHW.device.type):
        dtype = torch.get_autocast_dtype(x_NCHW.device.type)
        x_NCHW, weight = x_NCHW.to(dtype), weight.to(dtype)
    return _Convolution.apply(x_NCHW, weight, geometry, explanation, at_entry)


@torch.compiler.allow_in_graph  # as it is: see `TracedExplanation.fused`
def _traced_convolution(x_NCHW: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return _convolution(x_NCHW, weight, geometry)


class _Bcos(Holdable):
    """What the two layers share: the exponent, MaxOut, weight normalisation and the scale."""

    weight: Tensor
    b_mode: ExponentMode
    b_value: Tensor | None  # B where it follows a schedule: 0-d, saved with the weights
    b_offset: nn.Parameter | None  # B - 2 where it is learned: 0-d, so that weight decay pulls B towards 2
    max_out: int
    normalize_weight: bool

    def _configure(self, b: float, max_out: int, normalize_weight: bool, b_mode: ExponentMode = "fixed") -> None:
        if max_out < 1:
            raise ValueError(f"max_out must be at least 1, not {max_out}")
        self.b_mode, self._fixed_b = b_mode, check_exponent(b)
        self.register_buffer("b_value", torch.tensor(float(b)) if b_mode == "scheduled" else None)
        self.register_parameter("b_offset", nn.Parameter(torch.tensor(b - 2.0)) if b_mode == "learned" else None)
        self.max_out, self.normalize_weight = max_out, normalize_weight

    @property
    def b(self) -> float | Tensor:
        """The exponent B >= 1: a number, or a 0-d tensor where it is scheduled or learned (then with its gradient)."""
        if self.b_offset is not None:
            return torch.where(self.b_offset < -1, 1.0, 2 + self.b_offset)  # a clamp would have no gradient at 1 itself
        return self._fixed_b if self.b_value is None else self.b_value

    def _rows(self) -> Tensor:
        """The weight rows as they are used, each of norm 1 where `normalize_weight` is set."""
        if not self.normalize_weight:
            return self.weight
        axes = tuple(range(1, self.weight.ndim))  # not flattened: the memory format stays
        return self.weight / torch.linalg.vector_norm(self.weight, dim=axes, keepdim=True).clamp_min(VECTOR_EPSILON)

    def _scale(self, linear: Tensor, norm: Tensor) -> Tensor:
        """s^(B-1) · linear, with s = |linear| / norm held in explanation mode."""
        b = self.b
        squares = isinstance(b, float) and b == 2
        explanation = self.explanation
        fused = not torch.compiler.is_compiling() if explanation is None else explanation.fused
        if squares and fused:
            return _Square.apply(linear, norm) if explanation is None else _ExplainedSquare.apply(linear, norm, explanation)[0]
        with self.computing_factor():
            size = widened(linear).abs()
            cosine = size * norm.reciprocal() if torch.is_grad_enabled() else size.mul_(norm.reciprocal())
            factor = cosine if squares else (cosine + COSINE_EPSILON).pow(b - 1)
        return (linear * self.hold(factor)).to(linear.dtype)

    def _is_linear(self) -> bool:
        return self.b_mode == "fixed" and self._fixed_b == 1

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        b = float(torch.as_tensor(self.b).detach())
        more = f", max_out={self.max_out}" if self.max_out > 1 else ""
        return f"{super().extra_repr()}, b={b:g}{more}" + (", normalize_weight" if self.normalize_weight else "")


class BcosConv2d(_Bcos, nn.Conv2d):
    """B-cos convolution: (N, in_channels, H, W) -> (N, out_channels, H', W').

    Arguments are those of `nn.Conv2d`, with `b` the exponent B >= 1, `max_out` the units of which each output is the maximum,
    and `normalize_weight` for rows of norm 1. `weight` is (out_channels*max_out, in_channels/groups, kh, kw); unit m of
    output o is row o*max_out + m. A bias is added after the scaling. At B = 1 the layer is an ordinary convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        b: float = 2.0,
        max_out: int = 1,
        normalize_weight: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels * max_out,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            False,
            padding_mode,
        )
        self._configure(b, max_out, normalize_weight)
        self.out_channels = out_channels
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        x_NCHW, padding = self._padded(x_NCHW)
        geometry: Geometry = (self.stride, padding, self.dilation, self.groups)  # type: ignore[assignment]
        explanation, weight = self.explanation, self._rows()
        if explanation is None or explanation.detach:
            linear = F.conv2d(x_NCHW, weight, None, *geometry)
        elif explanation.fused:
            linear = _convolution(x_NCHW, weight, geometry, explanation)
        else:
            linear = _traced_convolution(x_NCHW, weight, geometry)
        if self.max_out > 1:
            linear = linear.unflatten(1, (-1, self.max_out)).max(2).values
        if not self._is_linear():
            with self.computing_factor():
                norm = self._patch_norm(x_NCHW, padding)
            linear = self._scale_patches(linear, norm)
        return linear if self.bias is None else (linear + self.bias[:, None, None]).to(linear.dtype)

    def _scale_patches(self, linear_NCHW: Tensor, norm_NGHW: Tensor) -> Tensor:
        if self.groups in (1, self.out_channels):  # the norm broadcasts as it is
            return self._scale(linear_NCHW, norm_NGHW)
        grouped = linear_NCHW.unflatten(1, (self.groups, -1))
        return self._scale(grouped, norm_NGHW.unsqueeze(2)).flatten(1, 2)

    def _padded(self, x_NCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where the convolution and the pool of the norm could not both do it themselves."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x_NCHW, self.padding  # type: ignore[return-value]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x_NCHW, self._reversed_padding_repeated_twice, mode=mode), (0, 0)

    def _patch_norm(self, x_NCHW: Tensor, padding: tuple[int, int]) -> Tensor:
        """sqrt(Σ_patch x² + ε) for each group and place: a sum pool of Σ_c x²; (N, groups, H', W')."""
        if self.groups == 1 and not torch.compiler.is_compiling():
            squares = _SumOfSquares.apply(x_NCHW, self.explanation)
        elif self.groups == x_NCHW.shape[1]:
            squares = widened(x_NCHW).square()
        else:
            squares = widened(x_NCHW).square().unflatten(1, (self.groups, -1)).sum(2)
        if math.prod(self.kernel_size) == 1 and padding == (0, 0):
            sums = squares[:, :, :: self.stride[0], :: self.stride[1]]
        elif self.dilation == (1, 1) and all(2 * p <= k for p, k in zip(padding, self.kernel_size, strict=True)):
            sums = F.avg_pool2d(squares, self.kernel_size, self.stride, padding, divisor_override=1)
        else:  # the pool knows neither dilation nor wide padding: a convolution of one channel a group
            ones = squares.new_ones(self.groups, 1, *self.kernel_size)
            with torch.autocast(squares.device.type, enabled=False):
                sums = F.conv2d(squares, ones, None, self.stride, padding, self.dilation, self.groups)
        return (sums + PATCH_EPSILON).sqrt()


class BcosLinear(_Bcos, nn.Linear):
    """B-cos linear layer: (..., in_features) -> (..., out_features); arguments as in `BcosConv2d`.

    `weight` is (out_features*max_out, in_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        b: float = 2.0,
        max_out: int = 1,
        normalize_weight: bool = False,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features * max_out, False)
        self._configure(b, max_out, normalize_weight)
        self.out_features = out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        linear = F.linear(x, self._rows())
        if self.max_out > 1:
            linear = linear.unflatten(-1, (-1, self.max_out)).max(-1).values
        if not self._is_linear():
            with self.computing_factor():
                squares = widened(x).square().sum(-1, keepdim=True)
                norm = squares.clamp_min(VECTOR_EPSILON**2).sqrt() + VECTOR_EPSILON  # finite second derivatives at 0
            linear = self._scale(linear, norm)
        return linear if self.bias is None else (linear + self.bias).to(linear.dtype)
