"""Attribution maps of B-cos and conventional models: which pixels speak for a class.

Layouts in names: N images, T targets of each image, K classes, C channels, HW places.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.explain import contribution_map, dynamic_weights, frozen, input_gradients, predicted
from pipelines.bcos.explanation import Explanation, explaining
from pipelines.models import ModelError


class Method(Protocol):
    """An attribution method: images (N, 6, H, W) and targets (N, T) -> logits (N, K) and maps (N, T, h, w)."""

    def __call__(
        self, model: nn.Module, images: Tensor, targets_NT: Tensor, *, layer: str | None, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits and maps, with their graph where `create_graph` is set."""


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
    """The map of one class of each image.

    Args:
        model: a model of this project: (N, 6, H, W) in [0, 1] -> logits (N, K), with the buffer `mean` (6,). It is left as it
            was: training flags, `requires_grad`, gradients.
        images: (N, 6, H, W) in [0, 1].
        targets: (N,) class indices.
        method: a key of `METHODS`:

            - `bcos`: Σ_c W_c(x)·x_c with the dynamic weights W(x), as published.
            - `bcos_centered`: Σ_c W_c(x)·(x_c - m_c), which sums to logit - logit bias in a bias-free B-cos CNN.
            - `input_x_gradient`: Σ_c (x_c - m_c)·∂logit/∂x_c, the same for conventional models.
            - `integrated_gradients`: captum's, from the mean image; options `steps` (32), `internal_batch_size`.
            - `gradcam`: positive part of Σ_c f_c·mean(∂logit/∂f_c), f the last convolutional features.
        layer: dotted name of a module of `model` whose output (N, C, h, w) is explained in the place of the input (for
            `gradcam`: in the place of the last convolutional features). The map is then Σ_c f_c·(∂logit/∂f_c).
        resize: maps of a layer are resized bilinearly to (H, W).
        create_graph: keep the graph of the maps, for losses on them.
        **options: of the method.

    Returns:
        (N, H, W), or (N, h, w) with `resize=False`; signed, but for `gradcam` (>= 0).

    Raises:
        ValueError: unknown method or layer (the nearest names are given); a layer without a spatial output.

    Source: Böhle et al., TPAMI 2024, eq. 6; Shrikumar et al., 2016; Sundararajan et al., 2017; Selvaraju et al., 2017.
    """
    asked = {"method": method, "layer": layer, "resize": resize, "create_graph": create_graph}
    return attribute_many(model, images, targets[:, None], **asked, **options)[:, 0]


def attribute_many(model: nn.Module, images: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Maps of several classes of each image from one forward pass: targets (N, T) -> (N, T, H, W).

    Keyword arguments are those of `attribute`.
    """
    return explain(model, images, targets, **options)[1]


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    method: str = "bcos",
    layer: str | None = None,
    resize: bool = True,
    create_graph: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and maps (N, T, H, W) of the classes `targets` (N, T), from one forward pass; else as `attribute`."""
    if method not in METHODS:
        raise ValueError(f"unknown attribution method {method!r}: {', '.join(METHODS)} are known")
    with torch.enable_grad(), contextlib.nullcontext() if create_graph else frozen(model):
        logits, maps = METHODS[method](model, images, targets, layer=layer, create_graph=create_graph, **options)
        if resize and maps.shape[-2:] != images.shape[-2:]:
            maps = F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return (logits, maps) if create_graph else (logits.detach(), maps.detach())


def explain_pairs(
    explain_some: Callable[[Tensor, Tensor], tuple[Tensor, ...]], images: Tensor, present: Tensor
) -> tuple[Tensor, ...]:
    """What `explain_some` finds for each pair of an image and one of its classes: a forward pass an image, a backward one a pair.

    Images with equally many classes are explained together. That goes for networks in evaluation mode, where what one image
    gives does not depend on the others.

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
        asked = targets if count else targets.new_zeros(len(rows), 1)  # for an image without any, the logits alone count
        logits, *values = explain_some(images[rows], asked)
        order.append(rows)
        places.append((starts[rows, None] + torch.arange(count, device=rows.device)).flatten())
        found.append((logits, *(value[:, :count].flatten(0, 1) for value in values)))
    logits, *values = (torch.cat(parts) for parts in zip(*found, strict=True))
    back, back_of_pairs = torch.cat(order).argsort(), torch.cat(places).argsort()
    return logits[back], *(value[back_of_pairs] for value in values)


def last_features(model: nn.Module, images: Tensor) -> str:
    """Name of the module that gives the last convolutional features of `model`, a container such as `layer4` counted.

    It is the last in order of execution, adaptive pools left out, whose output is (N, C, h, w) with more than one place and
    which runs before the classifier, the last layer with a weight matrix or kernel. A network that goes on with tokens, as ViTs
    do after their patches' embedding, has none. One image of `images` (N, 6, H, W) is sent through the model in evaluation mode.
    Where many batches are explained, resolve it once, and pass it as `layer`.

    Raises:
        ModelError: the model has no such module.
    """
    names = {module: name for name, module in model.named_modules() if name}
    spatial: list[str] = []  # since the last layer with weights
    before_classifier: list[str] = []  # up to it

    def record(module: nn.Module, inputs: object, output: object) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            before_classifier.extend(spatial)
            spatial.clear()
        if isinstance(module, nn.AdaptiveAvgPool2d) or not isinstance(output, Tensor) or output.ndim not in (3, 4):
            return
        if not _is_image(output, images):
            if isinstance(weight, Tensor) and weight.ndim == 1:  # a norm of tokens: it goes on from here
                before_classifier.clear()
                spatial.clear()
        elif len(output) == 1 and output[0, 0].numel() > 1:
            spatial.append(names[module])

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(record).remove)
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        model(images[:1].detach())
    if not before_classifier:
        name = type(getattr(model, "body", getattr(model, "network", model))).__name__
        raise ModelError(f"{name} has no convolutional features of more than one place for GradCAM: name a layer")
    return before_classifier[-1]


def _is_image(output: Tensor, images: Tensor) -> bool:
    """Whether `output` is (N, C, h, w) with the sides of `images` (N, 6, H, W), each divided by the same: not (N, h, w, C)."""
    if output.ndim != 4:
        return False
    (height, width), (h, w) = images.shape[2:], output.shape[2:]
    return abs(h * width - w * height) <= max(height, width)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block; afterwards each module is in its former one."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Features:
    """The output of one layer during a forward pass, as the point at which gradients are taken."""

    def __init__(self, model: nn.Module, layer: str, cut: bool) -> None:
        modules = dict(model.named_modules())
        if layer not in modules or not layer:
            near = difflib.get_close_matches(layer, modules, n=5, cutoff=0.4)
            told = f"near it: {', '.join(near)}" if near else f"its children: {', '.join(n for n, _ in model.named_children())}"
            raise ValueError(f"{type(model).__name__} has no layer {layer!r}; {told}")
        self.layer, self.module, self.cut = layer, modules[layer], cut
        self.value: Tensor | None = None

    def record(self, module: nn.Module, inputs: object, output: object) -> Tensor:
        """Forward hook. What goes on is a copy, so that an in-place activation behind leaves the recorded value alone."""
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {self.layer!r} cannot be explained: its output is {shape}, not (N, C, h, w)")
        if self.cut or not output.requires_grad:
            output = output.detach().requires_grad_()
        self.value = output
        return output.clone()

    def forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the features they were computed from."""
        handle = self.module.register_forward_hook(self.record)
        try:
            logits = model(images)
        finally:
            handle.remove()
        if self.value is None:
            raise ValueError(f"layer {self.layer!r} takes no part in the forward pass")
        if len(self.value) != len(images):
            raise ValueError(f"layer {self.layer!r} cannot be explained: it sees {len(self.value)} places, not images")
        return logits, self.value


def _forward(model: nn.Module, images: Tensor, layer: str | None, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and what they are explained by: the input, or the features of `layer`."""
    if layer is not None:
        return _Features(model, layer, cut=not create_graph).forward(model, images)
    if not images.requires_grad or not create_graph:
        images = images.detach().requires_grad_()
    return model(images), images


def _linear(
    model: nn.Module,
    images: Tensor,
    targets_NT: Tensor,
    *,
    layer: str | None,
    create_graph: bool,
    held: bool,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_c v_c·(∂logit/∂v_c), v the input (less its mean where `centered`) or the features of a layer.

    `held`: with the factors of a B-cos network held, so that the gradient is the row of W(x).
    """
    if held and layer is None:
        logits, weights_NTCHW = dynamic_weights(model, images, targets_NT, create_graph)
        return logits, _contributions(model, images, weights_NTCHW, centered)
    explanation = Explanation(detach=not create_graph)
    with explaining(model, explanation) if held else contextlib.nullcontext():
        logits, point = _forward(model, images, layer, create_graph)
        gradients_NTCHW = input_gradients(logits, targets_NT, point, create_graph)
    explanation.holding = False  # a loss on the maps has its full gradient
    return logits, _contributions(model, point if create_graph else point.detach(), gradients_NTCHW, centered and layer is None)


def _contributions(model: nn.Module, values: Tensor, gradients_NTCHW: Tensor, centered: bool) -> Tensor:
    """Σ_c v_c·g_c: (N, T, h, w)."""
    if centered:
        values = values - model.mean[:, None, None]  # type: ignore[index]
    return (values.unsqueeze(1) * gradients_NTCHW).sum(2)


def _gradcam(
    model: nn.Module, images: Tensor, targets_NT: Tensor, *, layer: str | None, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Positive part of Σ_c f_c·mean_HW(∂logit/∂f_c). Source: Selvaraju et al., Grad-CAM, 2017, eq. 1 and 2."""
    logits, features = _forward(model, images, layer or last_features(model, images), create_graph)
    weights_NTC11 = input_gradients(logits, targets_NT, features, create_graph).mean((3, 4), keepdim=True)
    values = features if create_graph else features.detach()
    return logits, (values.unsqueeze(1) * weights_NTC11).sum(2).relu()


def _integrated_gradients(
    model: nn.Module,
    images: Tensor,
    targets_NT: Tensor,
    *,
    layer: str | None,
    create_graph: bool,
    steps: int = 32,
    internal_batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """captum's integrated gradients along the line from the mean image. Source: Sundararajan et al., 2017, eq. 1."""
    from captum.attr import IntegratedGradients

    if layer is not None:
        raise ValueError("integrated_gradients explains the input alone: leave `layer` out")

    def gradients(
        forward_fn: Callable[[Tensor], Tensor], inputs: tuple[Tensor], target_ind: Tensor, additional_forward_args: None = None
    ) -> tuple[Tensor, ...]:
        logits = forward_fn(inputs[0])
        every_step = target_ind.expand(len(logits))  # captum repeats the targets for its steps, but not a single one
        return torch.autograd.grad(logits.gather(1, every_step[:, None]).sum(), inputs, create_graph=create_graph)

    integral = IntegratedGradients(model)  # of one function of an image alone: in training mode the batch would count, and move
    integral.gradient_func = gradients  # captum's own keeps no graph
    baseline = model.mean[:, None, None].expand_as(images)  # type: ignore[index]
    images = images if create_graph else images.detach()
    with torch.set_grad_enabled(create_graph):
        logits = model(images)  # first: in training mode it moves statistics that the graph of the maps keeps
    with _evaluating(model):
        maps = [
            integral.attribute(images, baseline, targets_N, n_steps=steps, internal_batch_size=internal_batch_size).sum(1)
            for targets_N in targets_NT.unbind(1)
        ]
    return logits, torch.stack(maps, dim=1)


class Explainer(Protocol):
    """What of a model is compared with another's: images (N, 6, H, W) -> logits (N, K) and maps (N, ...) of one class each."""

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor | None = None, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and maps of the classes `targets` (N,), by default those that the model predicts."""


def explain_one(
    model: nn.Module, images: Tensor, targets: Tensor | None = None, create_graph: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """`explain` of one class an image, by default the one that the model predicts: logits (N, K) and maps (N, h, w).

    A compiler can trace B-cos maps of the input; others are computed eagerly also where it is at work, and their model too.
    """
    if options.get("method", "bcos") == "bcos" and options.get("layer") is None:
        logits, weights = dynamic_weights(model, images, targets, create_graph)
        return logits, contribution_map(images, weights)
    return _explain_one_eagerly(model, images, targets, create_graph, **options)


@torch.compiler.disable  # hooks, and gradients taken inside, are beyond it
def _explain_one_eagerly(
    model: nn.Module, images: Tensor, targets: Tensor | None, create_graph: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    with torch.compiler.set_stance("force_eager"):
        if targets is None:
            with torch.no_grad():
                targets = predicted(model(images))
        logits, maps_NTHW = explain(model, images, targets[:, None], create_graph=create_graph, **options)
    return logits, maps_NTHW[:, 0]


def explainers(one: nn.Module, other: nn.Module, images: Tensor, *, held: bool) -> tuple[Explainer, Explainer]:
    """How two models are explained so that their maps compare.

    Args:
        one, other: models of this project, of any architectures.
        images: (N, 6, H, W), of which the first is sent through to find the last convolutional features.
        held: both are B-cos: their maps are the dynamic weights W(x), (N, 6, H, W). Otherwise both are explained by GradCAM of
            the last convolutional features, resized to (N, H, W).

    Source: Parchami-Araghi et al., Good Teachers Explain, ECCV 2024, section 3.
    """
    if held:
        return dynamic_weights, dynamic_weights
    gradcam = partial(explain_one, method="gradcam")
    return partial(gradcam, layer=last_features(one, images)), partial(gradcam, layer=last_features(other, images))


METHODS: dict[str, Method] = {
    "bcos": partial(_linear, held=True, centered=False),
    "bcos_centered": partial(_linear, held=True, centered=True),
    "input_x_gradient": partial(_linear, held=False, centered=True),
    "integrated_gradients": _integrated_gradients,
    "gradcam": _gradcam,
}
