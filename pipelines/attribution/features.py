"""The output of a layer during a forward pass, as the point at which gradients are taken."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator

from torch import Tensor, nn


def forward_with_features(model: nn.Module, images: Tensor, layer: str, cut: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and the output (N, C, h, w) of `layer` from which they were computed.

    Args:
        model: images (N, 6, H, W) -> logits.
        images: of the batch.
        layer: dotted name of a module of `model`.
        cut: the features are a leaf of autograd's graph, which then ends there.

    Raises:
        ValueError: no such layer (the nearest names are given), or one whose output is not one feature map per image.
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
        """Gives the next layer a copy, so that an in-place activation leaves the captured features alone."""
        nonlocal features
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {layer!r} cannot be explained: its output is {shape}, not (N, C, h, w)")
        features = output.detach().requires_grad_() if cut or not output.requires_grad else output
        return features.clone()

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
    """Evaluation mode in the block; afterwards each module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
