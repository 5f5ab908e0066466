"""The output of a layer during a forward pass, as the point at which gradients are taken."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator

from torch import Tensor, nn


class _Capture:
    """A forward hook that keeps the output of one layer.

    `cut`: the output becomes a leaf, because nothing before the layer needs a gradient.
    """

    def __init__(self, model: nn.Module, layer: str, cut: bool) -> None:
        modules = dict(model.named_modules())
        if layer not in modules or not layer:
            near = difflib.get_close_matches(layer, modules, n=5, cutoff=0.4)
            told = f"near it: {', '.join(near)}" if near else f"its children: {', '.join(n for n, _ in model.named_children())}"
            raise ValueError(f"{type(model).__name__} has no layer {layer!r}; {told}")
        self.layer, self.module, self.cut = layer, modules[layer], cut
        self.features: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: object, output: object) -> Tensor:
        """Gives the next layer a copy, so that an in-place activation leaves the captured features alone."""
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {self.layer!r} cannot be explained: its output is {shape}, not (N, C, h, w)")
        if self.cut or not output.requires_grad:
            output = output.detach().requires_grad_()
        self.features = output
        return output.clone()


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
    capture = _Capture(model, layer, cut)
    handle = capture.module.register_forward_hook(capture)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if capture.features is None:
        raise ValueError(f"layer {layer!r} takes no part in the forward pass")
    if len(capture.features) != len(images):
        raise ValueError(f"layer {layer!r} cannot be explained: it sees {len(capture.features)} places, not images")
    return logits, capture.features


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
