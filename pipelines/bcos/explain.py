"""Dynamic weights W(x), the one place where they are computed, and what is made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.hold import Explanation, explaining

TINY = 1e-12


def dynamic_weights(model: nn.Module, images: Tensor, targets: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and the rows of W(x) of one class an image, from one forward and one backward pass.

    Args:
        model: a network of `convert` or `bcosify`, in training or evaluation mode.
        images: (N, 6, H, W) in [0, 1].
        targets: (N,) class indices.
        create_graph: keep the graph of both results, for losses on them: each then carries its full gradient with respect to
            the parameters (factors are held, not detached).

    Returns:
        logits (N, K) and weights (N, 6, H, W): logit_target = Σ weights·images + what no pixel carries.

    Source: Böhle et al., B-cos Alignment, TPAMI 2024, eq. 6 to 8.
    """
    if not images.requires_grad:
        images = images.detach().requires_grad_()
    with explaining(model, Explanation(detach=not create_graph)) as explanation, torch.enable_grad():
        logits = model(images)
        explained = logits.gather(1, targets[:, None]).sum()
        (weights,) = torch.autograd.grad(explained, images, create_graph=create_graph)
    explanation.holding = False
    return (logits, weights) if create_graph else (logits.detach(), weights)


def contribution_map(images: Tensor, weights: Tensor) -> Tensor:
    """Σ_c W_c(x)·x_c, what each pixel adds to the logit: images and weights (N, 6, H, W) -> (N, H, W), signed."""
    return (images * weights).sum(1)


def rgba(images: Tensor, weights: Tensor, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """The explanation as a picture: colours of the weights, opaque where they are large.

    Args:
        images, weights: (N, 6, H, W), as `dynamic_weights` takes and gives them.
        smooth: side of the mean filter of the opacity, pixels; odd, so that the size is kept.
        percentile: of an image's smoothed weight norms, which becomes fully opaque.

    Returns:
        (N, H, W, 4), red, green, blue, alpha in [0, 1].

    Source: Böhle et al., B-cos Networks, CVPR 2022, section 3.4; methods.md section 1 gives the constants.
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
    alpha = (alpha / opaque.clamp_min(TINY)).clamp(0, 1)
    return torch.cat([rgb, alpha], dim=1).permute(0, 2, 3, 1)
