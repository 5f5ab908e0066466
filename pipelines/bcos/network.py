"""The B-cos network around a converted body.

    logits = body((x - mean) / std) / T + logit bias,   x = [RGB, 1 - RGB] in [0, 1]

The complement 1 - RGB lets dark pixels contribute, too. Its normalised value is the negative of the
normalised RGB, so conversion splits the first layer's weight W into [W, -W]/2 and nothing changes.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.bcos.precision import widened

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANGE_TOLERANCE = 1e-3  # resizing and rounding to half precision may exceed [0, 1] by this much


def add_inverse(images: Tensor) -> Tensor:
    """Concatenates RGB images (N, 3, H, W) in [0, 1] and their complement 1 - x to (N, 6, H, W).

    Raises:
        ValueError: the images are not (N, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"add_inverse takes images of shape (N, 3, H, W), not {tuple(images.shape)}")
    return torch.cat([images, 1 - images], dim=1)


def six_channel_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Mean [m, 1-m] and standard deviation [σ, σ] of the six channels, each (6,), from those of RGB.

    A `mean` or `std` of six values is taken as it is.
    """
    mean_6 = mean if len(mean) == 6 else (*mean, *(1 - m for m in mean))
    std_6 = std if len(std) == 6 else (*std, *std)
    return torch.tensor(mean_6, dtype=torch.float32), torch.tensor(std_6, dtype=torch.float32)


def check_six_channels(images: Tensor) -> None:
    """Raises ValueError unless `images` is (N, 6, H, W)."""
    if images.ndim != 4 or images.shape[1] != 6:
        raise ValueError(
            f"a model of this project takes (N, 6, H, W) in [0, 1], not {tuple(images.shape)}: "
            "apply add_inverse to RGB images"
        )


def _warn_of_range(images: Tensor) -> None:
    """Warns if values lie outside [0, 1], because the images are already normalised or in 0 to 255."""
    with contextlib.suppress(RuntimeError):  # under vmap, values cannot be read
        least, most = (float(value) for value in images.detach().aminmax())
        if least < -RANGE_TOLERANCE or most > 1 + RANGE_TOLERANCE:
            told = (
                "a B-cos network takes images in [0, 1] and normalises them itself; "
                f"these lie in [{least:.3g}, {most:.3g}]"
            )
            warnings.warn(told, stacklevel=3)


class LocationsToBatch(nn.Module):
    """Replaces a global pool, so that the classifier sees each location: (N, C, H, W) -> (N·H·W, C, 1, 1).

    The H·W locations of an image are adjacent. `BcosNetwork` averages their logits.
    """

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1], 1, 1)


class EmbeddingTower(nn.Module):
    """Base class of networks that map images to embeddings (N, D). They have no classes, so no logit bias.

    `projection` is the dotted name of the last linear layer, or `None` if the tower does not end in one. This
    layer stays linear for every B of the other layers, unless `bcosify(projection="bcos")` makes it a B-cos
    layer.
    """

    projection: str | None = None


class BcosNetwork(nn.Module):
    """A B-cos network with normalisation inside: images (N, 6, H, W) in [0, 1] -> logits (N, K).

    The logits are z/T + `logit_bias`, with z the output of `body` for the normalised images. If
    `LocationsToBatch` replaces the body's global pool, z is the mean of the body's outputs over the locations
    of an image. If the network has no biases, Σ W(x)·(x - mean) is the logit minus the logit bias, so the
    image `mean` (6,) has a contribution of zero. Logits have single precision at least, because adding the
    logit bias in half precision would cost digits.

    Args:
        body: takes normalised images (N, 6, H, W).
        mean, std: of RGB images in [0, 1], or of their six channels, see `six_channel_statistics`.
        logit_bias: added to every logit.
        temperature: T.
    """

    mean: Tensor
    std: Tensor
    bias_share: Tensor | None
    _looked_at_range = False

    def __init__(
        self,
        body: nn.Module,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        logit_bias: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.body = body
        self.logit_bias, self.temperature = logit_bias, temperature
        self.design: dict[str, Any] = {}  # the arguments of `bcosify` that took effect
        mean_6, std_6 = six_channel_statistics(mean, std)
        self.register_buffer("mean", mean_6, persistent=False)
        self.register_buffer("std", std_6, persistent=False)
        self.register_buffer("bias_share", None)  # of `fade_biases`

    def __call__(self, images: Tensor) -> Tensor:
        """Calls `forward`; warns if the first batch has values outside [0, 1]."""
        if not self._looked_at_range and not torch.compiler.is_compiling():
            self._looked_at_range = True
            _warn_of_range(images)
        return super().__call__(images)

    def forward(self, images: Tensor) -> Tensor:
        check_six_channels(images)
        logits = widened(self.body((images - self.mean[:, None, None]) / self.std[:, None, None]))
        if len(logits) != len(images):  # logits (N·H·W, K) of all locations
            logits = logits.view(len(images), -1, logits.shape[-1]).mean(1)
        return logits / self.temperature + self.logit_bias

    def extra_repr(self) -> str:
        return f"logit_bias={self.logit_bias:.4g}, temperature={self.temperature:g}"
