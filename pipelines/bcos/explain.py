"""Dynamic weights W(x), computed here alone, and their contributions and pictures."""

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

# Several classes are explained by several backward passes through one graph; a compiled graph allows one by default.
torch._functorch.config.donated_buffer = False


def dynamic_weights(
    model: nn.Module, images: Tensor, targets: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits, and the rows of W(x) for one class or several classes of each image, from one forward pass.

    Args:
        model: a network of `convert` or `bcosify`, in training or evaluation mode, compiled or not, frozen or not. The caller
            may be in any gradient mode, and in autocast.
        images: (N, 6, H, W) in [0, 1].
        targets: (N,) class indices, or (N, T) for T classes of each image, which take one backward pass per class. `None`: the
            class that the model predicts.
        create_graph: keep the graph of both results, for losses on them: each then carries its full gradient with respect to
            the parameters (factors are held, not detached). To compile the network, compile the function that computes the loss
            and calls this one, because compiled code has no second derivative of its own.

    Returns:
        logits (N, K) and weights (N, 6, H, W), or (N, T, 6, H, W): logit_target = Σ weights·images + the biases' part.

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
            torch.clear_autocast_cache()  # without gradients, a pass before this one cached weights that have none
        with _entry_noted(model, explanation) if create_graph and own else nullcontext():
            logits = model(images)
        explanation.of_input = True
        weights = input_gradients(logits, targets, images, create_graph)
    explanation.holding = explanation.of_input = False
    return (logits, weights) if create_graph else (logits.detach(), weights)


@contextmanager
def _entry_noted(model: nn.Module, explanation: Explanation) -> Iterator[None]:
    """In the block, `explanation.entry` is set to the input of a B-cos network's body: later backward passes can end there."""

    def note(body: nn.Module, inputs: tuple[Tensor]) -> None:
        explanation.entry = inputs[0]

    handle = model.body.register_forward_pre_hook(note) if isinstance(model, BcosNetwork) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def predicted(logits: Tensor) -> Tensor:
    """The class with the highest of the logits (N, K): (N,)."""
    return logits.detach().argmax(1)


def input_gradients(
    logits: Tensor, targets: Tensor | None, point: Tensor, create_graph: bool = False
) -> Tensor:
    """∂logit_target/∂point (N, ...) for targets (N,); (N, T, ...) for targets (N, T); `None`: of the predicted class.

    Logits (N, K) were computed from `point`; each of the T targets takes one backward pass through their graph.
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
    """In the block no parameter requires a gradient, so that autograd keeps nothing for theirs: up to a third faster."""
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
    """`dynamic_weights` in a form that a compiler can trace and differentiate again."""
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
    """Σ_c W_c(x)·x_c, what each pixel adds to the logit; signed. Features and their gradients go, too.

    Images (N, C, H, W) with weights (N, C, H, W) give (N, H, W), with weights (N, T, C, H, W) of T classes (N, T, H, W).
    """
    return ((images if weights.ndim == 4 else images.unsqueeze(1)) * weights).sum(-3)


def rgba(
    images: Tensor, weights: Tensor, smooth: int = 15, percentile: float = 99.5, *, one_scale: bool = False
) -> Tensor:
    """The explanation as a picture: colours of the weights, opaque where they are large.

    Args:
        images, weights: (N, 6, H, W), as `dynamic_weights` takes and gives them.
        smooth: side of the mean filter of the opacity, pixels; odd, so that the size is kept.
        percentile: percentile of an image's smoothed weight norms at which pixels are fully opaque.
        one_scale: the largest of these percentiles counts for all images, so that their opacities compare.

    Returns:
        (N, H, W, 4), red, green, blue, alpha in [0, 1].

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
