"""The verbs: `attribute` and `explain` images by one of `METHODS`, `explain_pairs` of images and their classes.

Layouts in names: N images, T targets of each image, K classes, C channels, HW places.
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
    """Images (N, 6, H, W) and targets, as `explain` takes them -> logits (N, K) and maps (N, h, w) or (N, T, h, w)."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor | None,
        *,
        layer: str | None,
        create_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        """Logits and maps, with their graph where `create_graph` is set."""


METHODS: dict[str, AttributionMethod] = {
    "bcos": bcos,
    "bcos_centered": partial(bcos, centered=True),
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "gradcam": gradcam,
}


@dataclass(frozen=True)
class Attribution:
    """How a model is explained.

    Attributes:
        method: a key of `METHODS`, see `attribute`.
        layer: dotted name of the module whose output is explained; `None`: the input (of `gradcam`: the last features).
    """

    method: str = "bcos"
    layer: str | None = None

    @property
    def of_dynamic_weights(self) -> bool:
        """Whether the maps are W(x)·x of the input, the explanation that a B-cos network gives of itself."""
        return self.method == "bcos" and self.layer is None

    def resolved(self, model: nn.Module, images: Tensor) -> Attribution:
        """With the layer that GradCAM explains by default, see `last_features`; other attributions are returned unchanged."""
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
    """The map of one class of each image, or of T classes of each.

    Args:
        model: a model of this project: (N, 6, H, W) in [0, 1] -> logits (N, K), with the buffer `mean` (6,). It is left as it
            was: training flags, `requires_grad`, gradients.
        images: (N, 6, H, W) in [0, 1].
        targets: class indices (N,), or (N, T): from one forward pass.
        method: a key of `METHODS`:

            - `bcos`: Σ_c W_c(x)·x_c with the dynamic weights W(x), as published.
            - `bcos_centered`: Σ_c W_c(x)·(x_c - m_c), which sums to logit - logit bias in a bias-free B-cos CNN.
            - `input_x_gradient`: Σ_c (x_c - m_c)·∂logit/∂x_c, the same for conventional models.
            - `integrated_gradients`: captum's, from the mean image; options `steps` (32), `internal_batch_size`.
            - `gradcam`: positive part of Σ_c f_c·mean(∂logit/∂f_c), f the last convolutional features.
        layer: dotted name of a module of `model` whose output (N, C, h, w) is explained instead of the input (for `gradcam`:
            instead of the last convolutional features). The map is then Σ_c f_c·(∂logit/∂f_c).
        resize: maps of a layer are resized bilinearly to (H, W).
        create_graph: keep the graph of the maps, for losses on them.
        **options: of the method.

    Returns:
        (N, H, W), or (N, h, w) with `resize=False`; (N, T, ...) for targets (N, T). Signed, but for `gradcam` (>= 0).

    Raises:
        ValueError: unknown method or layer (the nearest names are given); a layer without a spatial output.

    Source: Böhle et al., TPAMI 2024, eq. 6; Shrikumar et al., 2016; Sundararajan et al., 2017; Selvaraju et al., 2017.
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
    """Logits (N, K) and maps of the classes `targets` from one forward pass; `None`: of the class that the model predicts.

    Targets (N,) give maps (N, H, W), targets (N, T) maps (N, T, H, W). Other arguments and errors are those of `attribute`. A
    compiler can trace B-cos maps of the input; other maps are computed eagerly in compiled code too, and so is their model.
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


@torch.compiler.disable  # a compiler cannot trace hooks and gradients that are taken inside
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
    """Explanations of each pair of an image and one of its classes: one forward pass per image, one backward pass per pair.

    Images with equally many classes are explained together. The model must be in evaluation mode, where the explanation of an
    image does not depend on the others.

    Args:
        explain_some: (images (n, C, H, W), targets (n, T)) -> logits (n, K) and values (n, T, ...), one or more.
        images: (N, C, H, W).
        present: (N, K) of bool, P of them true.

    Returns:
        Logits (N, K), and values (P, ...) of the pairs in the order of `present.nonzero()`.
    """
    counts = present.sum(1)
    starts = counts.cumsum(0) - counts
    places: list[Tensor] = []
    found: list[tuple[Tensor, ...]] = []
    order: list[Tensor] = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        targets = present[rows].nonzero()[:, 1].view(len(rows), count)
        asked = (
            targets if count else targets.new_zeros(len(rows), 1)
        )  # of an image without any class, only the logits are used
        logits, *values = explain_some(images[rows], asked)
        order.append(rows)
        places.append((starts[rows, None] + torch.arange(count, device=rows.device)).flatten())
        found.append((logits, *(value[:, :count].flatten(0, 1) for value in values)))
    logits, *values = (torch.cat(parts) for parts in zip(*found, strict=True))
    back, back_of_pairs = torch.cat(order).argsort(), torch.cat(places).argsort()
    return logits[back], *(value[back_of_pairs] for value in values)


class Explainer(Protocol):
    """Explains one class of each image: images (N, 6, H, W) -> logits (N, K) and maps (N, ...)."""

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and maps of the classes `targets` (N,), by default those that the model predicts."""


def comparable_explainers(
    one: nn.Module, other: nn.Module, images: Tensor, *, held: bool
) -> tuple[Explainer, Explainer]:
    """How two models are explained so that their maps compare.

    Args:
        one, other: models of this project, of any architectures.
        images: (N, 6, H, W); the first one is sent through to find the last convolutional features.
        held: both are B-cos: their maps are the dynamic weights W(x), (N, 6, H, W). Otherwise both are explained by GradCAM of
            the last convolutional features, resized to (N, H, W).

    Source: Parchami-Araghi et al., Good Teachers Explain, ECCV 2024, section 3.
    """
    if held:
        return dynamic_weights, dynamic_weights
    of_one, of_other = (
        partial(explain, attribution=Attribution("gradcam").resolved(model, images)) for model in (one, other)
    )
    return of_one, of_other
