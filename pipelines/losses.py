"""All losses, one function each.

Letters: N images, K classes, D embedding dimensions. A are attribution maps (N, h, w), signed, with A⁺ =
max(A, 0); M are masks (N, H, W) of {0, 1}. Localisation losses normalise A on its own grid and resize it
bilinearly to the size of M; the energy losses resize the signed A before they clamp it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-7  # a map with less positive energy Σ A⁺ counts as empty
LARGEST_FACTOR = 5.0  # upper bound of 1/area^α in the size-corrected energy loss
LEAST_BLOCK = 256  # least number of targets per block of the sigmoid loss


def uniform_off_label_bce(logits: Tensor, targets: Tensor, off_label: float | None = None) -> Tensor:
    """Mean binary cross-entropy over images and classes, with targets of at least `off_label`: a scalar.

    Args:
        logits: (N, K).
        targets: class indices (N,), or (N, K) in [0, 1].
        off_label: target of classes that are not in the image; `None` is 1/K.

    Source: Böhle et al., B-cos Alignment, TPAMI 2024, appendix; B-cos-v2's UniformOffLabelsBCEWithLogitsLoss.
    """
    classes = logits.shape[1]
    wanted = F.one_hot(targets, classes) if targets.ndim == 1 else targets
    wanted = wanted.to(logits.dtype).clamp_min(1 / classes if off_label is None else off_label)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """τ²·KL(softmax(t/τ) ‖ softmax(s/τ)) of logits (N, K): a scalar, the mean over images.

    Source: Hinton et al., 2015.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def binary_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """τ²·Σ_k KL(σ(t_k/τ) ‖ σ(s_k/τ)) of logits (N, K): a scalar, the mean over images.

    For multi-label data, where each class is a decision of its own with its threshold at logit 0. A softmax
    does not see a shift of all logits, so it would not teach this threshold.
    """
    student, teacher = student_logits / temperature, teacher_logits / temperature
    wanted = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, wanted, reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher, wanted, reduction="none")
    return temperature**2 * (cross - own).sum(1).mean()


def explanation_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """1 - cosine of each pair of maps (N, ...), flattened: (N,) in [0, 2].

    Source: Parchami-Araghi et al., Good Teachers Explain, ECCV 2024, eq. 3.
    """
    return 1 - F.cosine_similarity(student_maps.flatten(1), teacher_maps.flatten(1), dim=1)


def energy_loss(attributions: Tensor, masks: Tensor) -> Tensor:
    """1 - Σ_M A⁺ / Σ A⁺, the share of positive attribution outside the mask: (N,) in [0, 1].

    If Σ A⁺ < 1e-7, the loss is 1 - Σ_M A⁺.

    Source: Rao et al., ICCV 2023, eq. 2 and 6.
    """
    masks = masks.to(attributions.dtype)
    positive = _resize(attributions, masks).clamp_min(0)
    inside, total = (positive * masks).sum((1, 2)), positive.sum((1, 2))
    return 1 - inside / torch.where(total < TINY, 1.0, total)


def size_corrected_energy_loss(attributions: Tensor, masks: Tensor, alpha: float = 0.5) -> Tensor:
    """1 - EPG/area^α, where area is the share of the image that the mask covers: (N,) in [-4, 1].

    1 - EPG is the energy loss. It is small for large masks, because much of any map lies in them; here,
    energy in a small mask counts more. The factor 1/area^α is at most LARGEST_FACTOR, which also bounds the
    ratio of this loss's gradient to that of the energy loss.

    Args:
        attributions: (N, h, w), signed.
        masks: (N, H, W) of {0, 1} or bool.
        alpha: α in [0, 1]; 0 gives the energy loss.

    Source: Sauter et al., 2024, and their code. There the area is in pixels, so λ there is λ here times
        (H·W)^α.
    """
    area = masks.to(attributions.dtype).mean((1, 2))
    return 1 - (1 - energy_loss(attributions, masks)) * area.pow(-alpha).clamp_max(LARGEST_FACTOR)


def l1_loss(attributions: Tensor, masks: Tensor) -> Tensor:
    """Mean of |A⁺/max A⁺ - M| over all pixels: (N,) in [0, 1]. Source: Rao et al., ICCV 2023, eq. 3."""
    masks = masks.to(attributions.dtype)
    return (_resize(_by_maximum(attributions.clamp_min(0)), masks) - masks).abs().mean((1, 2))


def rrr_loss(attributions: Tensor, masks: Tensor) -> Tensor:
    """Σ of (A/max|A|)² over the pixels outside the mask: (N,) >= 0.

    Source: Ross et al., 2017, as RRR* in Rao et al., ICCV 2023, eq. 5.
    """
    masks = masks.to(attributions.dtype)
    return (_resize(_by_maximum(attributions), masks).square() * (1 - masks)).sum((1, 2))


def ppce_loss(attributions: Tensor, masks: Tensor) -> Tensor:
    """Mean of -log(A⁺/max A⁺) over the pixels inside the mask, 0 if the mask is empty: (N,) in [0, 100].

    As in `F.binary_cross_entropy`, of which it is the value for targets of 1, the logarithm is at least -100.

    Source: Shen et al., 2021, as per-pixel cross-entropy in Rao et al., ICCV 2023, eq. 4.
    """
    masks = masks.to(attributions.dtype)
    inside = _resize(_by_maximum(attributions.clamp_min(0)), masks).clamp(0, 1)
    with torch.autocast(inside.device.type, enabled=False):  # CUDA refuses this function under autocast
        entropy = F.binary_cross_entropy(inside, torch.ones_like(inside), reduction="none")
    return (entropy * masks).sum((1, 2)) / masks.sum((1, 2)).clamp_min(1)


def siglip_loss(
    features: Tensor, targets: Tensor, scale: float, bias: float, positives: Tensor | None = None
) -> Tensor:
    """Pairwise sigmoid loss of embeddings: a scalar, the sum over all pairs divided by N.

    The logit of a pair (i, j) is scale·cos(features_i, targets_j) + bias. The pair is positive if j is the
    target of i, and negative otherwise.

    Args:
        features: (N, D).
        targets: (N, D), row i being the target of feature i. With `positives`: (M, D) in any order, without
            gradient; a row of zeros is padding, which is in no pair.
        scale: finite and above 0.
        bias: added to every logit.
        positives: (N,) int64, the row of `targets` that is the target of each feature. Loss and gradient are
            then computed in blocks of max(N, 256) targets, so that memory grows with N and not with M.

    Raises:
        ValueError: `scale` is not finite or not above 0.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, eq. 1.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"siglip_loss: the scale must be finite and above 0, not {scale}")
    features = F.normalize(features, dim=1)
    if positives is not None:
        total, _ = _siglip_of_pairs(features, targets.detach(), positives, scale, bias)
        return total / len(features)
    with torch.autocast(features.device.type, enabled=False):
        logits = scale * features @ F.normalize(targets, dim=1).T + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


@torch.library.custom_op("bcos_pipelines::siglip_of_pairs", mutates_args=())
def _siglip_of_pairs(
    features: Tensor, targets: Tensor, positives: Tensor, scale: float, bias: float
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over all pairs, a scalar, and its gradient (N, D) by the normalised features.

    A custom operation, because autograd would save the logits of every block, and torch.compile would unroll
    the loop.
    """
    total, gradient = features.new_zeros(()), torch.zeros_like(features)
    size = max(len(features), LEAST_BLOCK)
    with torch.autocast(features.device.type, enabled=False):
        for start in range(0, len(targets), size):
            block = F.normalize(targets[start : start + size].to(features.dtype), dim=1)
            places = torch.arange(start, start + len(block), device=features.device)
            signs = torch.where(positives[:, None] == places, 1.0, -1.0).to(features.dtype)
            signs *= (block != 0).any(1)  # 0 for padding, which leaves the pair out of both sums
            logits = signs * (scale * features @ block.T + bias)
            total -= (F.logsigmoid(logits) * signs.abs()).sum()
            gradient -= scale * ((signs * torch.sigmoid(-logits)) @ block)
    return total, gradient


@_siglip_of_pairs.register_fake
def _(
    features: Tensor, targets: Tensor, positives: Tensor, scale: float, bias: float
) -> tuple[Tensor, Tensor]:
    return features.new_empty(()), torch.empty_like(features)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _give_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    return grad * ctx.saved_tensors[0], None, None, None, None


_siglip_of_pairs.register_autograd(_give_gradient, setup_context=_keep_gradient)


def info_nce_loss(features: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE loss of embeddings: a scalar.

    The logits (N, N) are cos(features_i, targets_j)/temperature. The loss is the mean of the cross-entropies
    over targets and over features.

    Args:
        features: (N, D).
        targets: (N, D), row i being the target of feature i.
        temperature: finite and above 0.

    Raises:
        ValueError: `temperature` is not finite or not above 0.

    Source: van den Oord et al., 2018; symmetric as in Radford et al., Learning Transferable Visual Models,
        ICML 2021, figure 3.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"info_nce_loss: the temperature must be finite and above 0, not {temperature}")
    with torch.autocast(features.device.type, enabled=False):
        logits = F.normalize(features, dim=1) @ F.normalize(targets, dim=1).T / temperature
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def cosine_embedding_loss(features: Tensor, targets: Tensor) -> Tensor:
    """1 - mean cosine of the pairs of embeddings (N, D): a scalar in [0, 2]."""
    return 1 - F.cosine_similarity(features, targets, dim=1).mean()


def _by_maximum(maps: Tensor) -> Tensor:
    """Divides each map by its largest absolute value; maps of zeros stay as they are."""
    largest = maps.abs().amax((1, 2), keepdim=True)
    return maps / torch.where(largest == 0, 1.0, largest)


def _resize(maps: Tensor, masks: Tensor) -> Tensor:
    """Resizes maps (N, h, w) bilinearly to the size of the masks (N, H, W)."""
    if maps.shape[1:] == masks.shape[1:]:
        return maps
    return F.interpolate(maps[:, None], size=masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
