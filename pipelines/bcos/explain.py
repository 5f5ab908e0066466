"""Dynamic weights W(x) of B-cos networks, contribution maps and colour pictures.

    logit_k = Σ_pixels Σ_c W_k(x)_c · x_c + constants           (Böhle et al., TPAMI 2024, eq. 6 to 8)

`dynamic_weights` is the only place where W(x) is computed. Losses, metrics, pictures and the served model all
call it.

Letters: N images, T targets per image, K classes, C channels (6: RGB and its complement), H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.explanation import Explanation, TracedExplanation, explaining, recording, usable
from pipelines.bcos.network import BcosNetwork

TINY = 1e-12

# T targets take T backward passes through one graph; with donated buffers, compiled graphs allow only one.
torch._functorch.config.donated_buffer = False


def dynamic_weights(
    model: nn.Module, images: Tensor, targets: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits and the rows of W(x) for one or more classes per image, from one forward pass.

    Args:
        model: B-cos network of `convert` or `bcosify`; may be in training or evaluation mode, compiled, or
            frozen. The caller may be in any gradient mode, and in autocast.
        images: (N, 6, H, W) in [0, 1].
        targets: class indices (N,), or (N, T) for T classes per image, which take T backward passes. `None`
            explains the predicted classes.
        create_graph: keep the graph of logits and weights for losses on them. Both then carry their full
            gradient with respect to the parameters, because factors are held, not detached. To compile such a
            loss, compile the function that computes it and calls `dynamic_weights`, not the network:
            torch.compile has no double backward.

    Returns:
        Logits (N, K) and weights (N, 6, H, W), or (N, T, 6, H, W) for targets (N, T):
        logit_target = Σ weights·images + constants of biases and embeddings.

    Raises:
        RuntimeError: targets (N, T) in compiled code.

    Source: Böhle et al., B-cos Alignment, TPAMI 2024, eq. 6 to 8.
    """
    if torch.compiler.is_compiling():
        return _traced(model, images, targets, create_graph)
    explanation, own = Explanation(detach=not create_graph), not create_graph or not images.requires_grad
    with recording(), nullcontext() if create_graph else frozen(model), explaining(model, explanation):
        images, targets = usable(images), None if targets is None else usable(targets)
        if own:
            images = images.detach().requires_grad_()
        if create_graph and torch.is_autocast_enabled(images.device.type):
            # a forward pass without gradients may have cached weights in half precision that have no graph
            torch.clear_autocast_cache()
        with _entry_noted(model, explanation) if create_graph and own else nullcontext():
            logits = model(images)
        explanation.of_input = True
        weights = input_gradients(logits, targets, images, create_graph)
    explanation.holding = explanation.of_input = False
    return (logits, weights) if create_graph else (logits.detach(), weights)


@contextmanager
def _entry_noted(model: nn.Module, explanation: Explanation) -> Iterator[None]:
    """Context manager in which a `BcosNetwork` notes the input of its body in `explanation.entry`."""

    def note(body: nn.Module, inputs: tuple[Tensor]) -> None:
        explanation.entry = inputs[0]

    handle = model.body.register_forward_pre_hook(note) if isinstance(model, BcosNetwork) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def predicted(logits: Tensor) -> Tensor:
    """Class indices (N,) of the highest logits (N, K)."""
    return logits.detach().argmax(1)


def input_gradients(
    logits: Tensor, targets: Tensor | None, point: Tensor, create_graph: bool = False
) -> Tensor:
    """∂logit_target/∂point: (N, ...) for targets (N,) or `None` (predicted classes), else (N, T, ...).

    Args:
        logits: (N, K), computed from `point`.
        targets: (N,), or (N, T), which takes T backward passes through the graph of the logits.
        point: (N, ...), images or features.
        create_graph: keep the graph of the gradients.
    """
    targets = predicted(logits) if targets is None else targets
    if targets.ndim == 1:
        return input_gradients(logits, targets[:, None], point, create_graph)[:, 0]
    gradients: list[Tensor] = []
    for index, targets_N1 in enumerate(targets.split(1, dim=1), start=1):
        chosen = logits.gather(1, targets_N1).sum()
        again = create_graph or index < targets.shape[1]
        gradients += torch.autograd.grad(chosen, point, create_graph=create_graph, retain_graph=again)
    return torch.stack(gradients, dim=1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context manager in which no parameter requires a gradient: explanations are up to a third faster."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad = True


def _traced(
    model: nn.Module, images: Tensor, targets: Tensor | None, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """`dynamic_weights` by `torch.func.grad`, which torch.compile can trace and differentiate again."""
    if targets is not None and targets.ndim == 2:
        raise RuntimeError("compiled dynamic weights are those of one class per image: targets (N,)")

    def target_logits(point: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(point)
        columns = (predicted(logits) if targets is None else targets)[:, None]
        return logits.gather(1, columns).sum(), logits

    explanation = TracedExplanation(detach=not create_graph)
    with explaining(model, explanation):
        weights, logits = torch.func.grad(target_logits, has_aux=True)(images)
    explanation.settle()
    return (logits, weights) if create_graph else (logits.detach(), weights.detach())


def contribution_map(images: Tensor, weights: Tensor) -> Tensor:
    """Σ_c W_c(x)·x_c, the signed contribution of each pixel to the logit.

    Also used with features of a layer and their gradients.

    Args:
        images: (N, C, H, W).
        weights: (N, C, H, W), or (N, T, C, H, W) for T classes per image.

    Returns:
        (N, H, W), or (N, T, H, W).
    """
    return ((images if weights.ndim == 4 else images.unsqueeze(1)) * weights).sum(-3)


def rgba(
    images: Tensor, weights: Tensor, smooth: int = 15, percentile: float = 99.5, *, one_scale: bool = False
) -> Tensor:
    """Colour pictures of explanations: the colour of W(x) per pixel, opaque where its norm is large.

    Args:
        images, weights: (N, 6, H, W), as `dynamic_weights` takes and returns them.
        smooth: side of the mean filter over the opacity, in pixels; odd, so that the filter keeps the size.
        percentile: percentile of an image's smoothed weight norms from which pixels are fully opaque.
        one_scale: divide all images by the largest of their percentiles, so that opacities compare across
            images.

    Returns:
        (N, H, W, 4): red, green, blue and alpha in [0, 1].

    Raises:
        ValueError: `smooth` is even.

    Source: Böhle et al., B-cos Networks, CVPR 2022, section 3.4; the constants are those of its code.
    """
    if smooth % 2 == 0:
        raise ValueError(f"smooth must be odd, not {smooth}")
    positive = (weights / weights.abs().amax(1, keepdim=True).clamp_min(TINY)).clamp_min(0)
    colours, complements = positive.chunk(2, dim=1)
    rgb = colours / (colours + complements + TINY)
    alpha = weights.norm(dim=1, keepdim=True)
    alpha = torch.where(contribution_map(images, weights).unsqueeze(1) < 0, TINY, alpha)
    alpha = F.avg_pool2d(alpha, smooth, stride=1, padding=smooth // 2)
    opaque = torch.quantile(alpha.flatten(1).float(), percentile / 100, dim=1)[:, None, None, None]
    opaque = opaque.amax().expand_as(opaque) if one_scale else opaque
    alpha = (alpha / opaque.clamp_min(TINY)).clamp(0, 1)
    return torch.cat([rgb, alpha], dim=1).permute(0, 2, 3, 1)
