"""GradCAM: the channels of the last convolutional features, weighted by their mean gradients.

    map = max(0, Σ_c f_c · mean_HW(∂logit/∂f_c)),   f the features (C, h, w)

Source: Selvaraju et al., Grad-CAM, ICCV 2017, eq. 1 and 2.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from pipelines.attribution.features import evaluating
from pipelines.attribution.gradients import gradients_at
from pipelines.bcos.cosine import CosineHead
from pipelines.bcos.explain import contribution_map
from pipelines.models import ModelError


def gradcam(
    model: nn.Module, images: Tensor, targets: Tensor | None, *, layer: str | None, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Logits and GradCAM maps of `layer`, by default of `last_features`; see `AttributionMethod`."""
    layer = layer or last_features(model, images)
    logits, features, gradients = gradients_at(model, images, targets, layer, create_graph)
    return logits, contribution_map(features, gradients.mean((-2, -1), keepdim=True)).relu()


def last_features(model: nn.Module, images: Tensor) -> str:
    """Dotted name of the module that gives the last convolutional features of `model`.

    This is the last module, in the order of execution, that runs before the classifier and whose output is
    (N, C, h, w) with more than one location. Adaptive pools do not count; containers such as `layer4` do.
    The classifier is the last layer with a weight matrix or kernel. Networks that go on with tokens, as ViTs
    do after the patch embedding, have no such module.

    One of the images (N, 6, H, W) is sent through the model in evaluation mode. If you explain many batches,
    call this function once and pass its result as `layer`.

    Raises:
        ModelError: the model has no such module.
    """
    names = {module: name for name, module in model.named_modules() if name}
    spatial: list[str] = []  # modules with spatial output that ran after the last layer with weights
    before_classifier: list[str] = []  # modules with spatial output that ran before it

    def record(module: nn.Module, inputs: object, output: object) -> None:
        weight = module.texts if isinstance(module, CosineHead) else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            before_classifier.extend(spatial)
            spatial.clear()
        if (
            isinstance(module, nn.AdaptiveAvgPool2d)
            or not isinstance(output, Tensor)
            or output.ndim not in (3, 4)
        ):
            return
        if not _is_image(output, images):
            # a norm of tokens: the network goes on with tokens, so the features so far are not the last ones
            if isinstance(weight, Tensor) and weight.ndim == 1:
                before_classifier.clear()
                spatial.clear()
        elif len(output) == 1 and output[0, 0].numel() > 1:
            spatial.append(names[module])

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(record).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        model(images[:1].detach())
    if not before_classifier:
        name = type(getattr(model, "body", getattr(model, "network", model))).__name__
        raise ModelError(
            f"{name} has no convolutional features of more than one place for GradCAM: name a layer"
        )
    return before_classifier[-1]


def _is_image(output: Tensor, images: Tensor) -> bool:
    """Returns True if `output` is (N, C, h, w) with the aspect ratio of `images`, unlike (N, h, w, C)."""
    if output.ndim != 4:
        return False
    (height, width), (h, w) = images.shape[2:], output.shape[2:]
    return abs(h * width - w * height) <= max(height, width)
