"""Checks for every architecture: `convert` preserves the function, W(x) is the frozen Jacobian.

`check_conversion(model, images)` and `check_frozen_jacobian(model, images)` take a plain network with random
weights and a few images (N, 3, H, W) in [0, 1] of its input size.
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
    """Returns random images that are smoother than noise: (count, 3, side, side) in [0, 1]."""
    coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8))
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def normalised(images: Tensor) -> Tensor:
    """Normalises images (N, 3, H, W) in [0, 1] for a plain network."""
    mean, std = (torch.tensor(values).to(images)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Randomises parameters that start at one value (biases, norm and layer scales, zero heads).

    A layer scale of 1e-6 or a zero head would hide errors in the layers before it.
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
    """Gives a random `model` features of the scale of a trained one, and puts it into evaluation mode.

    Norms get the statistics of `images`, a batch of the model's inputs. Each B-cos layer's weight is scaled
    so that its outputs have a standard deviation of 1, because at B = 2 the features of random layers vanish
    with depth.
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
    """Returns the largest difference of logits after conversion, relative to the largest logit."""
    before, after = model(normalised(images)), convert(model, **choices)(add_inverse(images))
    return float((before - after).abs().max() / before.abs().max())


def check_conversion(model: nn.Module, images: Tensor, **choices: Any) -> None:
    """Asserts that `convert` preserves logits to 1e-4, and in float64 to 1e-5 (means stay in float32)."""
    settle(shake(model), normalised(images))
    assert conversion_difference(model, images, **choices) <= 1e-4
    assert conversion_difference(model.double(), images.double(), **choices) <= 1e-5
    model.float()


class Tape:
    """The factors that a network's layers hold: recorded in one forward pass, replayed as constants."""

    def __init__(self) -> None:
        self.factors: dict[Holdable, list[Tensor]] = defaultdict(list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the factors that layers pass to `hold` in the block."""

        def note(layer: Holdable, factor: Tensor) -> Tensor:
            self.factors[layer].append(factor.detach().clone())
            return factor

        with mock.patch.object(Holdable, "hold", note), mock.patch.object(Explanation, "fused", False):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Makes `hold` return the recorded factors in the block, whatever the input is."""
        left = {layer: deque(factors) for layer, factors in self.factors.items()}
        given = mock.patch.object(Holdable, "hold", lambda layer, factor: left[layer].popleft())
        with given, mock.patch.object(Explanation, "fused", False):
            yield


def check_frozen_jacobian(
    model: nn.Module, images: Tensor, *, tower: bool = False, **choices: Any
) -> BcosNetwork:
    """Asserts that W(x) of the B-cosified network is its Jacobian with the factors frozen at x.

    The frozen network replays recorded factors as constants, so the check does not depend on how layers hold
    them. W(x) is compared with its whole gradient, and with central differences, which need no backward pass.
    Float64, to 1e-4 of ‖W‖. Two more assertions make sure that the check can fail: each holdable layer holds
    a factor, and the ordinary gradient differs from W(x).

    Args:
        model: network with random weights.
        images: (N, 3, H, W) in [0, 1].
        tower: whether `model` returns embeddings, not logits.
        choices: design choices of `bcosify`.

    Returns:
        The B-cosified network, in float64, for further checks.
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
        missed += float(
            misses.amin(0).sum()
        )  # long steps may cross the kink of a ReLU, short ones lose precision
        total += float(expected.abs().sum())
    assert missed <= 1e-4 * total

    (ordinary,) = torch.autograd.grad(network(x).gather(1, targets[:, None]).sum(), x)
    assert relative(weights, ordinary) > 1e-3
    return network


@torch.no_grad()
def _slope(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float) -> Tensor:
    """Returns the central difference per image: (N,)."""
    return (function(at + step * direction) - function(at - step * direction)) / (2 * step)
