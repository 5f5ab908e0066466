"""Captures the output of a layer in a forward pass, so that gradients can be taken with respect to it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator

from torch import Tensor, nn


def forward_with_features(model: nn.Module, images: Tensor, layer: str, cut: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and the output (N, C, h, w) of `layer` from which they were computed.

    Args:
        model: images (N, 6, H, W) -> logits (N, K).
        images: (N, 6, H, W).
        layer: dotted name of a module of `model`.
        cut: make the features a leaf, at which autograd's graph ends.

    Raises:
        ValueError: the model has no such layer (the message gives the nearest names), the layer does not run,
            or its output is not one feature map (C, h, w) per image.
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        near = difflib.get_close_matches(layer, modules, n=5, cutoff=0.4)
        told = (
            f"near it: {', '.join(near)}"
            if near
            else f"its children: {', '.join(n for n, _ in model.named_children())}"
        )
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}; {told}")
    features: Tensor | None = None

    def capture(module: nn.Module, inputs: object, output: object) -> Tensor:
        nonlocal features
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {layer!r} cannot be explained: its output is {shape}, not (N, C, h, w)")
        features = output.detach().requires_grad_() if cut or not output.requires_grad else output
        return features.clone()  # an in-place activation that follows must not change the features

    handle = modules[layer].register_forward_hook(capture)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if features is None:
        raise ValueError(f"layer {layer!r} takes no part in the forward pass")
    if len(features) != len(images):
        raise ValueError(f"layer {layer!r} cannot be explained: it sees {len(features)} places, not images")
    return logits, features


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager that puts `model` in evaluation mode and restores the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
