"""The B-cos network around a converted body: what comes before its first layer and after its last."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.bcos.precision import widened

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANGE_TOLERANCE = 1e-3  # resizing and rounding to half precision may leave [0, 1] by so much


def add_inverse(images: Tensor) -> Tensor:
    """RGB images (N, 3, H, W) in [0, 1] and their complement 1 - x: (N, 6, H, W) in [0, 1].

    Raises:
        ValueError: not three channels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"add_inverse takes images of shape (N, 3, H, W), not {tuple(images.shape)}")
    return torch.cat([images, 1 - images], dim=1)


def six_channel_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Mean [m, 1-m] and deviation [σ, σ] of the six channels, each (6,), from those of RGB; six values are taken as they are."""
    mean_6 = mean if len(mean) == 6 else (*mean, *(1 - m for m in mean))
    std_6 = std if len(std) == 6 else (*std, *std)
    return torch.tensor(mean_6, dtype=torch.float32), torch.tensor(std_6, dtype=torch.float32)


def check_six_channels(images: Tensor) -> None:
    """Raises ValueError unless `images` is (N, 6, H, W)."""
    if images.ndim != 4 or images.shape[1] != 6:
        raise ValueError(
            f"a model of this project takes (N, 6, H, W) in [0, 1], not {tuple(images.shape)}: apply add_inverse to RGB images"
        )


def _warn_of_range(images: Tensor) -> None:
    """Warns where values lie outside [0, 1]: such images were normalised before, or are bytes."""
    with contextlib.suppress(RuntimeError):  # under vmap there are no values to look at
        least, most = (float(value) for value in images.detach().aminmax())
        if least < -RANGE_TOLERANCE or most > 1 + RANGE_TOLERANCE:
            told = f"a B-cos network takes images in [0, 1] and normalises them itself; these lie in [{least:.3g}, {most:.3g}]"
            warnings.warn(told, stacklevel=3)


class LocationsToBatch(nn.Module):
    """Stands where the global pool was: (N, C, H, W) -> (N·H·W, C, 1, 1), so that the classifier sees every location."""

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N·H·W, C, 1, 1), the locations of an image next to each other."""
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1], 1, 1)


class EmbeddingTower(nn.Module):
    """A network that maps images to embeddings (N, D): it has no classes, so no logit bias.

    `projection` is the dotted name of its last linear layer; `None` if it ends otherwise. The layer stays linear (B = 1 at every
    B of the others) unless `bcosify(projection="bcos")` makes it a B-cos layer.
    """

    projection: str | None = None


class BcosNetwork(nn.Module):
    """Images (N, 6, H, W) in [0, 1] -> logits (N, K) = z/T + logit bias, with normalisation inside.

    `body` takes the normalised six channels. Where its global pool was replaced by `LocationsToBatch`, its outputs for the
    locations of an image are averaged here. `mean` (6,) is the image whose contribution is zero.
    """

    mean: Tensor
    std: Tensor
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
        self.design: dict[str, Any] = {}  # the arguments of `bcosify` as they took effect
        mean_6, std_6 = six_channel_statistics(mean, std)
        self.register_buffer("mean", mean_6, persistent=False)
        self.register_buffer("std", std_6, persistent=False)

    def __call__(self, images: Tensor) -> Tensor:
        """As `forward`; the first batch is looked at for values outside [0, 1], of which it warns."""
        if not self._looked_at_range and not torch.compiler.is_compiling():
            self._looked_at_range = True
            _warn_of_range(images)
        return super().__call__(images)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 6, H, W) in [0, 1] -> (N, K), of single precision at least: the bias would take half's digits."""
        check_six_channels(images)
        logits = widened(self.body((images - self.mean[:, None, None]) / self.std[:, None, None]))
        if len(logits) != len(images):  # the classifier saw every location
            logits = logits.view(len(images), -1, logits.shape[-1]).mean(1)
        return logits / self.temperature + self.logit_bias

    def extra_repr(self) -> str:
        """The layer's arguments, as `print` shows them."""
        return f"logit_bias={self.logit_bias:.4g}, temperature={self.temperature:g}"
