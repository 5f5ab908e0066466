"""Checks that hold for every architecture: what `convert` must preserve, and what W(x) must be.

`check_conversion(model, images)` and `check_frozen_jacobian(model, images)` take a plain network, at random weights, and a few
images (N, 3, H, W) in [0, 1] of the size that it takes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import pipelines.models  # noqa: F401  (registers the rules of the libraries)
from pipelines.bcos import (
    BcosConv2d,
    BcosLinear,
    BcosNetwork,
    Holdable,
    add_inverse,
    bcosify,
    convert,
    dynamic_weights,
    explanation_mode,
)
from pipelines.bcos.design import class_count
from pipelines.bcos.explanation import Explanation
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD


def pictures(count: int, side: int) -> Tensor:
    """Random pictures, smoother than noise: (count, 3, side, side) in [0, 1]."""
    coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8))
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def normalised(images: Tensor) -> Tensor:
    """What a plain network takes: (N, 3, H, W) -> the same."""
    mean, std = (torch.tensor(values).to(images)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """`model`, whose parameters that start at one value (biases, norm and layer scales, heads at 0) are random instead.

    A layer scale of 1e-6 or a head at 0 would hide whatever goes wrong before it.
    """
    for parameter in model.parameters():
        if parameter.numel() < 2 or (parameter - parameter.flatten()[0]).abs().max() > 0:
            continue
        if parameter.flatten()[0] == 0:
            parameter.normal_(0, 0.2 if parameter.ndim != 2 else parameter.shape[1] ** -0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` in evaluation mode, on the scale of a trained network, from a batch (as `model` takes it).

    The statistics of its norms are those of the batch. The features of random layers vanish in depth at B = 2: each B-cos layer's
    weight is scaled so that its outputs have a standard deviation of 1.
    """

    def scale(layer: Any, _: object, output: Tensor) -> Tensor:
        deviation = output.std().clamp_min(1e-30)
        layer.weight *= deviation ** (-1 / float(layer.b))
        return output / deviation

    layers = [module for module in model.modules() if isinstance(module, BcosConv2d | BcosLinear)]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    model.train()(images)
    for hook in hooks:
        hook.remove()
    norms: list[Any] = [module for module in model.modules() if hasattr(module, "momentum")]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def conversion_difference(model: nn.Module, images: Tensor, **choices: Any) -> float:
    """Largest difference between the logits of `model` (evaluation mode) and of its conversion, over the largest logit."""
    before, after = model(normalised(images)), convert(model, **choices)(add_inverse(images))
    return float((before - after).abs().max() / before.abs().max())


def check_conversion(model: nn.Module, images: Tensor, **choices: Any) -> None:
    """`convert` preserves the function: in float32 to 1e-4, in float64 to 1e-5 (means are kept in float32)."""
    settle(shake(model), normalised(images))
    assert conversion_difference(model, images, **choices) <= 1e-4
    assert conversion_difference(model.double(), images.double(), **choices) <= 1e-5
    model.float()


class Tape:
    """The factors that the layers of a network hold, recorded in one forward pass and given back, as constants, in others."""

    def __init__(self) -> None:
        self.factors: dict[Holdable, list[Tensor]] = defaultdict(list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In the block, what layers pass to `hold` is noted down."""

        def note(layer: Holdable, factor: Tensor) -> Tensor:
            self.factors[layer].append(factor.detach().clone())
            return factor

        with mock.patch.object(Holdable, "hold", note), mock.patch.object(Explanation, "fused", False):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """In the block, `hold` gives what it gave when recorded, whatever the input is."""
        left = {layer: deque(factors) for layer, factors in self.factors.items()}
        given = mock.patch.object(Holdable, "hold", lambda layer, factor: left[layer].popleft())
        with given, mock.patch.object(Explanation, "fused", False):
            yield


def check_frozen_jacobian(
    model: nn.Module, images: Tensor, *, tower: bool = False, **choices: Any
) -> BcosNetwork:
    """W(x) of the B-cosified network is the Jacobian of that network with its input-dependent factors frozen at x.

    The frozen network replays recorded factors as constants, so nothing of how layers hold them is trusted: its whole gradient
    is compared, and central differences, which trust no backward pass either. Float64, to 1e-4 of ‖W‖. Also checked: each
    holdable layer holds something, and the ordinary gradient is another one, or the check would say nothing.

    Args:
        model: at random weights.
        images: (N, 3, H, W) in [0, 1].
        tower: whether `model` gives embeddings, not logits.
        choices: of `bcosify`.

    Returns:
        the network, float64, for further checks.
    """
    network = bcosify(shake(model), logit_bias=0.0, **choices).double()
    assert (class_count(model, network) is None) == tower, (
        "a classifier taken for an embedding tower, or the reverse"
    )
    images = add_inverse(images.double())
    settle(network, images)
    with torch.no_grad():
        targets = network(images).abs().argmax(1)
    logits, weights = dynamic_weights(network, images, targets)
    assert relative(dynamic_weights(network, images, targets, create_graph=True)[1].detach(), weights) <= 1e-6

    tape = Tape()
    with explanation_mode(network), torch.no_grad(), tape.recording():
        assert relative(network(images), logits) <= 1e-9
    idle = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, Holdable) and not tape.factors[layer]
    ]
    assert not idle, f"these layers held nothing: {idle}"

    def frozen(x: Tensor) -> Tensor:
        with explanation_mode(network), tape.replaying():
            return network(x).gather(1, targets[:, None])[:, 0]

    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(frozen(x).sum(), x)
    assert relative(weights, gradient) <= 1e-4

    missed, total = 0.0, 0.0
    for direction in torch.randn(3, *images.shape).to(images):
        expected = (weights * direction).sum((1, 2, 3))
        misses = torch.stack(
            [(_slope(frozen, images, direction, step) - expected).abs() for step in (1e-5, 1e-6, 1e-7)]
        )
        missed += float(misses.amin(0).sum())  # a long step may cross a ReLU's kink, a short one is rounded
        total += float(expected.abs().sum())
    assert missed <= 1e-4 * total

    (ordinary,) = torch.autograd.grad(network(x).gather(1, targets[:, None]).sum(), x)
    assert relative(weights, ordinary) > 1e-3
    return network


@torch.no_grad()
def _slope(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float) -> Tensor:
    """The central difference, an image: (N,)."""
    return (function(at + step * direction) - function(at - step * direction)) / (2 * step)
