"""The B-cos transformation as a linear layer and a convolution.

    out = s^(B-1) · (w·x),   s = |w·x| / ‖x‖                      (Böhle et al., TPAMI 2024, eq. 3 and 4)

x is the input vector (of a convolution, one patch), w is one row of the weight, and s = ‖w‖·|cos θ| for the
angle θ between them. The larger B, the more the output depends on the alignment of x and w. At B = 1 the
layer is linear. At B > 1 it is dynamic linear: it multiplies x by a weight that depends on x, s^(B-1)·w.

B-cos networks trained from scratch use w/‖w‖ for w (`normalize_weight`), so that s = |cos θ|. B-cosified ones
use w itself (Arya et al., 2024). `fused` holds the autograd functions that make the layers fast.

Suffixes of names give the layout: N images, C channels, G groups, H x W locations of the feature map.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.explanation import Holdable
from pipelines.bcos.fused import Geometry, convolution, square, sum_of_squares
from pipelines.bcos.precision import widened

PATCH_EPSILON = 1e-6  # added to the sum of squares under the root of a patch's norm
VECTOR_EPSILON = 1e-12  # added to the norm of a linear layer's input; least norm of a weight row
COSINE_EPSILON = 1e-6  # added to s if B is not 2

ExponentMode = Literal["fixed", "scheduled", "learned"]


class _Bcos(Holdable):
    """Base class of both layers: the scale s^(B-1), the exponent B, MaxOut and weight normalisation."""

    weight: Tensor
    b_mode: ExponentMode
    b_value: Tensor | None  # scheduled B: 0-d buffer, saved with the weights
    b_offset: nn.Parameter | None  # learned B - 2: 0-d; weight decay pulls it towards 0, so B towards 2
    max_out: int
    normalize_weight: bool

    def _scale(self, linear: Tensor, norm: Tensor) -> Tensor:
        """s^(B-1) · linear, with s = |linear| / norm. Explanation mode holds s^(B-1)."""
        b, explanation = self.b, self.explanation
        b_is_2 = isinstance(b, float) and b == 2
        if b_is_2 and (not torch.compiler.is_compiling() if explanation is None else explanation.fused):
            return square(linear, norm, explanation)
        with self.computing_factor():
            magnitude = widened(linear).abs()
            cosine = (
                magnitude * norm.reciprocal()
                if torch.is_grad_enabled()
                else magnitude.mul_(norm.reciprocal())
            )
            factor = cosine if b_is_2 else (cosine + COSINE_EPSILON).pow(b - 1)
        return (linear * self.hold(factor)).to(linear.dtype)

    def _rows(self) -> Tensor:
        """The weight, with rows of norm 1 if `normalize_weight` is set."""
        if not self.normalize_weight:
            return self.weight
        axes = tuple(range(1, self.weight.ndim))  # flatten(1) would lose the memory format
        return self.weight / torch.linalg.vector_norm(self.weight, dim=axes, keepdim=True).clamp_min(
            VECTOR_EPSILON
        )

    @property
    def b(self) -> float | Tensor:
        """The exponent B >= 1: a float if it is fixed, a 0-d tensor if it is scheduled or learned."""
        if self.b_offset is not None:
            # not a clamp: its gradient is 0 at B = 1, so B could not leave 1
            return torch.where(self.b_offset < -1, 1.0, 2 + self.b_offset)
        return self._fixed_b if self.b_value is None else self.b_value

    def _is_linear(self) -> bool:
        return self.b_mode == "fixed" and self._fixed_b == 1

    def _configure(
        self, b: float, max_out: int, normalize_weight: bool, b_mode: ExponentMode = "fixed"
    ) -> None:
        if max_out < 1:
            raise ValueError(f"max_out must be at least 1, not {max_out}")
        self.b_mode, self._fixed_b = b_mode, check_exponent(b)
        device = self.weight.device
        self.register_buffer(
            "b_value", torch.tensor(float(b), device=device) if b_mode == "scheduled" else None
        )
        self.register_parameter(
            "b_offset", nn.Parameter(torch.tensor(b - 2.0, device=device)) if b_mode == "learned" else None
        )
        self.max_out, self.normalize_weight = max_out, normalize_weight

    def extra_repr(self) -> str:
        b = float(torch.as_tensor(self.b).detach())
        more = f", max_out={self.max_out}" if self.max_out > 1 else ""
        return f"{super().extra_repr()}, b={b:g}{more}" + (
            ", normalize_weight" if self.normalize_weight else ""
        )


class BcosLinear(_Bcos, nn.Linear):
    """B-cos linear layer: (..., in_features) -> (..., out_features).

    `weight` is (out_features*max_out, in_features). The bias is added after the scaling.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        b: exponent B >= 1.
        max_out: units M per output. An output is the maximum of w·x over its M units; row o*max_out + m of
            `weight` is unit m of output o.
        normalize_weight: divide each row of `weight` by its norm.
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
        linear = F.linear(x, self._rows())
        if self.max_out > 1:
            linear = linear.unflatten(-1, (-1, self.max_out)).max(-1).values
        if not self._is_linear():
            with self.computing_factor():
                squares = widened(x).square().sum(-1, keepdim=True)
                # the clamp keeps second derivatives finite at x = 0
                norm = squares.clamp_min(VECTOR_EPSILON**2).sqrt() + VECTOR_EPSILON
            linear = self._scale(linear, norm)
        return linear if self.bias is None else (linear + self.bias).to(linear.dtype)


class BcosConv2d(_Bcos, nn.Conv2d):
    """B-cos convolution: (N, in_channels, H, W) -> (N, out_channels, H', W').

    Arguments are those of `nn.Conv2d`, with `b`, `max_out` and `normalize_weight` as in `BcosLinear`.
    `weight` is (out_channels*max_out, in_channels/groups, kh, kw). In a grouped convolution, ‖x‖ is the norm
    of the patch in the output channel's own group.
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
        geometry = (kernel_size, stride, padding, dilation, groups)
        nn.Conv2d.__init__(self, in_channels, out_channels * max_out, *geometry, False, padding_mode)
        self._configure(b, max_out, normalize_weight)
        self.out_channels = out_channels
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW, padding = self._padded(x_NCHW)
        geometry: Geometry = (self.stride, padding, self.dilation, self.groups)  # type: ignore[assignment]
        linear = convolution(x_NCHW, self._rows(), geometry, self.explanation)
        if self.max_out > 1:
            linear = linear.unflatten(1, (-1, self.max_out)).max(2).values
        if not self._is_linear():
            with self.computing_factor():
                norm = self._patch_norm(x_NCHW, padding)
            linear = self._scale_patches(linear, norm)
        return linear if self.bias is None else (linear + self.bias[:, None, None]).to(linear.dtype)

    def _scale_patches(self, linear_NCHW: Tensor, norm_NGHW: Tensor) -> Tensor:
        if self.groups in (1, self.out_channels):  # the norm's G channels broadcast to the C of the output
            return self._scale(linear_NCHW, norm_NGHW)
        grouped = linear_NCHW.unflatten(1, (self.groups, -1))
        return self._scale(grouped, norm_NGHW.unsqueeze(2)).flatten(1, 2)

    def _padded(self, x_NCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, and the zero padding that is left to the convolution and to the sum pool of the norm.

        Both pad with zeros by a number per side. For "same", "valid" and other padding modes, the input is
        padded here and (0, 0) is left.
        """
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x_NCHW, self.padding  # type: ignore[return-value]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x_NCHW, self._reversed_padding_repeated_twice, mode=mode), (0, 0)

    def _patch_norm(self, x_NCHW: Tensor, padding: tuple[int, int]) -> Tensor:
        """sqrt(Σ_patch x² + ε) per group, by a sum pool of Σ_c x²: (N, C, H, W) -> (N, G, H', W')."""
        if self.groups == 1 and not torch.compiler.is_compiling():
            squares = sum_of_squares(x_NCHW, self.explanation)
        elif self.groups == x_NCHW.shape[1]:
            squares = widened(x_NCHW).square()
        else:
            squares = widened(x_NCHW).square().unflatten(1, (self.groups, -1)).sum(2)
        if math.prod(self.kernel_size) == 1 and padding == (0, 0):
            sums = squares[:, :, :: self.stride[0], :: self.stride[1]]
        elif self.dilation == (1, 1) and all(
            2 * p <= k for p, k in zip(padding, self.kernel_size, strict=True)
        ):
            sums = F.avg_pool2d(squares, self.kernel_size, self.stride, padding, divisor_override=1)
        else:  # avg_pool2d has no dilation and pads by at most half the kernel: convolve with ones
            ones = squares.new_ones(self.groups, 1, *self.kernel_size)
            with torch.autocast(squares.device.type, enabled=False):
                sums = F.conv2d(squares, ones, None, self.stride, padding, self.dilation, self.groups)
        return (sums + PATCH_EPSILON).sqrt()


def check_exponent(b: float) -> float:
    """Returns `b` as a float; raises ValueError if it is below 1."""
    if not b >= 1:
        raise ValueError(f"B must be at least 1, not {b}")
    return float(b)


def layer_b(model: nn.Module) -> dict[str, float]:
    """The exponent B of each B-cos layer of `model`, keyed by the layer's dotted name."""
    return {
        name: float(torch.as_tensor(layer.b).detach())
        for name, layer in model.named_modules()
        if isinstance(layer, _Bcos)
    }


def set_b(model: nn.Module, b: float) -> None:
    """Sets the exponent of every B-cos layer of `model` whose B is scheduled.

    Raises:
        ValueError: `b` is below 1, or no layer has a scheduled B.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _Bcos) and layer.b_value is not None]
    if not layers:
        raise ValueError(
            "this network has no B-cos layer whose B follows a schedule: bcosify it with b_mode='scheduled'"
        )
    for layer in layers:
        layer.b_value.fill_(check_exponent(b))  # type: ignore[union-attr]


@torch.no_grad()
def clamp_b(model: nn.Module) -> None:
    """Sets the learned exponents of `model` that are below 1 to 1, where B has a gradient again."""
    for layer in model.modules():
        if isinstance(layer, _Bcos) and layer.b_offset is not None:
            layer.b_offset.clamp_(min=-1)
