"""Attribution of logits to pixels, by one of `METHODS`.

`attribute` returns maps, `explain` logits and maps from one forward pass, and `explain_pairs` explains the
pairs of images and their classes.

Letters: N images, T targets per image, K classes, P pairs of an image and a class, C channels, H x W pixels,
h x w locations of a layer's features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.attribution.gradcam import gradcam, last_features
from pipelines.attribution.gradients import bcos, input_x_gradient
from pipelines.attribution.integrated_gradients import integrated_gradients
from pipelines.bcos.explain import dynamic_weights, frozen
from pipelines.bcos.explanation import recording, usable


class AttributionMethod(Protocol):
    """Images (N, 6, H, W) and targets (N,) or (N, T) -> logits (N, K) and maps (N, h, w) or (N, T, h, w).

    `None` targets are the predicted classes. Logits and maps keep their graph if `create_graph` is set.
    """

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor | None,
        *,
        layer: str | None,
        create_graph: bool,
    ) -> tuple[Tensor, Tensor]: ...


METHODS: dict[str, AttributionMethod] = {
    "bcos": bcos,
    "bcos_centered": partial(bcos, centered=True),
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "gradcam": gradcam,
}


@dataclass(frozen=True)
class Attribution:
    """The choice of an attribution method and of a layer.

    Attributes:
        method: a key of `METHODS`, see `attribute`.
        layer: dotted name of the module to whose output the logit is attributed. `None` is the input, or the
            last convolutional features for `gradcam`.
    """

    method: str = "bcos"
    layer: str | None = None

    @property
    def of_dynamic_weights(self) -> bool:
        """True if the maps are W(x)·x at the input, the inherent explanation of a B-cos network."""
        return self.method == "bcos" and self.layer is None

    def resolved(self, model: nn.Module, images: Tensor) -> Attribution:
        """Fills in the default layer of `gradcam`, see `last_features`; other attributions do not change."""
        missing = self.method == "gradcam" and self.layer is None
        return replace(self, layer=last_features(model, images)) if missing else self


def attribute(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    method: str = "bcos",
    layer: str | None = None,
    resize: bool = True,
    create_graph: bool = False,
    **options: Any,
) -> Tensor:
    """Attribution maps of one class per image, or of T classes per image.

    Args:
        model: a model of this project, (N, 6, H, W) in [0, 1] -> logits (N, K), with a buffer `mean` (6,).
            Its training flags, `requires_grad` and gradients are left untouched.
        images: (N, 6, H, W) in [0, 1].
        targets: class indices (N,), or (N, T) for T classes per image, which share one forward pass.
        method: a key of `METHODS`:

            - `bcos`: Σ_c W_c(x)·x_c with the dynamic weights W(x), as published.
            - `bcos_centered`: Σ_c W_c(x)·(x_c - m_c), m the mean image. Sums to logit - logit bias in a
              bias-free B-cos CNN.
            - `input_x_gradient`: Σ_c (x_c - m_c)·∂logit/∂x_c, the same for conventional models.
            - `integrated_gradients`: captum's, from the mean image; options `steps` (32) and
              `internal_batch_size`.
            - `gradcam`: positive part of Σ_c f_c·mean(∂logit/∂f_c), f the last convolutional features.
        layer: dotted name of a module with output f (N, C, h, w), to which the logit is attributed instead of
            the input. The map is then Σ_c f_c·(∂logit/∂f_c); for `gradcam`, f replaces the last convolutional
            features.
        resize: resize maps of a layer bilinearly to (H, W).
        create_graph: keep the graph of the maps, for losses on them.
        **options: options of the method.

    Returns:
        (N, H, W), or (N, h, w) with `resize=False`; (N, T, ...) for targets (N, T). Signed, except `gradcam`,
        which is >= 0.

    Raises:
        ValueError: the method is unknown; the layer is unknown (the message gives the nearest names), has no
            output (N, C, h, w), or is given for `integrated_gradients`.
        ModelError: `gradcam` without `layer` finds no convolutional features.

    Source: Böhle et al., TPAMI 2024, eq. 6; Shrikumar et al., 2016; Sundararajan et al., 2017; Selvaraju et
        al., 2017.
    """
    by = Attribution(method, layer)
    return explain(model, images, targets, by, resize=resize, create_graph=create_graph, **options)[1]


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    attribution: Attribution = Attribution(),
    *,
    resize: bool = True,
    create_graph: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and attribution maps of the classes `targets`, from one forward pass.

    Targets (N,) give maps (N, H, W), and targets (N, T) give (N, T, H, W); `None` explains the predicted
    classes. Other arguments and errors are those of `attribute`. torch.compile can trace `bcos` maps of the
    input. For all other maps, the model runs eagerly, even if it is compiled.
    """
    if attribution.method not in METHODS:
        raise ValueError(f"unknown attribution method {attribution.method!r}: {', '.join(METHODS)} are known")
    method: Callable[..., tuple[Tensor, Tensor]] = METHODS[attribution.method]
    compute = partial(method, layer=attribution.layer, create_graph=create_graph, **options)
    if attribution.of_dynamic_weights:
        logits, maps = compute(model, images, targets)
    else:
        logits, maps = _eagerly(compute, model, images, targets, resize, create_graph)
    return (logits, maps) if create_graph else (logits.detach(), maps.detach())


@torch.compiler.disable  # a compiler can trace neither the hooks nor calls of `torch.autograd.grad`
def _eagerly(
    compute: Callable[..., tuple[Tensor, Tensor]],
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None,
    resize: bool,
    create_graph: bool,
) -> tuple[Tensor, Tensor]:
    eager = torch.compiler.set_stance("force_eager")
    with eager, recording(), nullcontext() if create_graph else frozen(model):
        logits, maps = compute(model, usable(images), None if targets is None else usable(targets))
        if resize and maps.shape[-2:] != images.shape[-2:]:
            maps_NTHW = maps if maps.ndim == 4 else maps.unsqueeze(1)
            maps_NTHW = F.interpolate(maps_NTHW, size=images.shape[-2:], mode="bilinear", align_corners=False)
            maps = maps_NTHW if maps.ndim == 4 else maps_NTHW.squeeze(1)
    return logits, maps


def explain_pairs(
    explain_some: Callable[[Tensor, Tensor], tuple[Tensor, ...]], images: Tensor, present: Tensor
) -> tuple[Tensor, ...]:
    """Explains each pair of an image and one of its classes, with a single forward pass per image.

    Images with equally many classes are explained in one call, so the model must be in evaluation mode, where
    the explanation of an image does not depend on the rest of the batch.

    Args:
        explain_some: (images (n, C, H, W), targets (n, T)) -> logits (n, K) and one or more values (n, T,
            ...), such as maps.
        images: (N, C, H, W).
        present: (N, K) of bool, True for the P pairs.

    Returns:
        Logits (N, K), and the values (P, ...) of the pairs in the order of `present.nonzero()`.
    """
    counts = present.sum(1)
    starts = counts.cumsum(0) - counts
    places: list[Tensor] = []
    found: list[tuple[Tensor, ...]] = []
    order: list[Tensor] = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        targets = present[rows].nonzero()[:, 1].view(len(rows), count)
        # images without a class give logits only; they are explained for class 0, and the values are dropped
        asked = targets if count else targets.new_zeros(len(rows), 1)
        logits, *values = explain_some(images[rows], asked)
        order.append(rows)
        places.append((starts[rows, None] + torch.arange(count, device=rows.device)).flatten())
        found.append((logits, *(value[:, :count].flatten(0, 1) for value in values)))
    logits, *values = (torch.cat(parts) for parts in zip(*found, strict=True))
    back, back_of_pairs = torch.cat(order).argsort(), torch.cat(places).argsort()
    return logits[back], *(value[back_of_pairs] for value in values)


class Explainer(Protocol):
    """Explains one class per image: images (N, 6, H, W) -> logits (N, K) and maps (N, ...).

    `None` targets are the predicted classes.
    """

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]: ...


def comparable_explainers(
    one: nn.Module, other: nn.Module, images: Tensor, *, held: bool
) -> tuple[Explainer, Explainer]:
    """Explainers of two models whose maps can be compared.

    Args:
        one, other: models of this project, of any architectures.
        images: (N, 6, H, W), of which the first is sent through each model to find GradCAM's layer.
        held: both models are B-cos networks. Their maps are then the dynamic weights W(x), (N, 6, H, W).
            Otherwise both models are explained by GradCAM of the last convolutional features, resized to (N,
            H, W).

    Source: Parchami-Araghi et al., Good Teachers Explain, ECCV 2024, section 3.
    """
    if held:
        return dynamic_weights, dynamic_weights
    of_one, of_other = (
        partial(explain, attribution=Attribution("gradcam").resolved(model, images)) for model in (one, other)
    )
    return of_one, of_other
