"""RandAugment (Cubuk et al., 2020): two operations drawn from fourteen, all of one magnitude, as torchvision's v2 has them.

Torchvision's own draws from torch's global generator and takes an image alone. Here all numbers come from the sample's
generator, and what moves the image moves its boxes, mask and maps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    from pipelines.data.loading.transforms import Views

OPERATIONS = 2  # an image
LARGEST = 30  # magnitude
_BILINEAR = InterpolationMode.BILINEAR


def rand_augment(views: Views, rng: random.Random, *, magnitude: int) -> Views:
    """`views` after two random operations; `image` is uint8 (3, H, W), and all views keep their size.

    Args:
        views: see `transforms`.
        rng: of the sample.
        magnitude: in [0, 30]; published: 10.
    """
    for name in rng.choices(list(_MOVES | _COLOURS), k=OPERATIONS):
        signed = magnitude / LARGEST * rng.choice((-1, 1))
        if name in _MOVES:
            views = {key: _MOVES[name](view, signed) for key, view in views.items()}
        else:
            views = {**views, "image": _COLOURS[name](views["image"], signed)}
    return views


def _affine(
    view: torch.Tensor,
    shear: tuple[float, float] = (0.0, 0.0),
    translate: tuple[int, int] = (0, 0),
    centre: list[float] | None = None,
) -> torch.Tensor:
    """`view` sheared by degrees and moved by pixels, black coming in."""
    return F.affine(view, 0.0, list(translate), 1.0, list(shear), interpolation=_BILINEAR, center=centre)


def _shear(view: torch.Tensor, strength: float, axis: int) -> torch.Tensor:
    """Sheared by up to 0.3 pixels a pixel, along width (axis 0) or height (1), the upper left corner staying."""
    degrees = math.degrees(math.atan(0.3 * strength))
    return _affine(view, shear=(degrees, 0.0) if axis == 0 else (0.0, degrees), centre=[0.0, 0.0])


def _translate(view: torch.Tensor, strength: float, axis: int) -> torch.Tensor:
    """Moved by up to 150/331 of the width (axis 0) or height (1)."""
    height, width = F.get_size(view)
    pixels = int(150 / 331 * strength * (width if axis == 0 else height))
    return _affine(view, translate=(pixels, 0) if axis == 0 else (0, pixels))


def _rotate(view: torch.Tensor, strength: float) -> torch.Tensor:
    """Turned by up to 30 degrees about its centre."""
    return F.rotate(view, 30 * strength, interpolation=_BILINEAR)


def _adjust(image: torch.Tensor, strength: float, function: Callable[[torch.Tensor, float], torch.Tensor]) -> torch.Tensor:
    """Brightness, colour, contrast or sharpness times a factor in [0.1, 1.9]."""
    return function(image, 1 + 0.9 * strength)


def _posterize(image: torch.Tensor, strength: float) -> torch.Tensor:
    """Of each pixel's 8 bits, the upper 8 to 4."""
    return F.posterize(image, round(8 - 4 * abs(strength)))


def _solarize(image: torch.Tensor, strength: float) -> torch.Tensor:
    """Values from a threshold on are inverted: 255 alone at strength 0, all at 1."""
    return F.solarize(image, 255 * (1 - abs(strength)))


def _unchanged(image: torch.Tensor, strength: float) -> torch.Tensor:
    """The image as it is."""
    return image


def _autocontrast(image: torch.Tensor, strength: float) -> torch.Tensor:
    """Each channel stretched to the whole range."""
    return F.autocontrast(image)


def _equalize(image: torch.Tensor, strength: float) -> torch.Tensor:
    """Each channel with a flat histogram."""
    return F.equalize(image)


# Operations of a view and a strength in [-1, 1]: those that move all views, and those of the image alone.
_MOVES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "ShearX": partial(_shear, axis=0),
    "ShearY": partial(_shear, axis=1),
    "TranslateX": partial(_translate, axis=0),
    "TranslateY": partial(_translate, axis=1),
    "Rotate": _rotate,
}
_COLOURS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "Identity": _unchanged,
    "Brightness": partial(_adjust, function=F.adjust_brightness),
    "Color": partial(_adjust, function=F.adjust_saturation),
    "Contrast": partial(_adjust, function=F.adjust_contrast),
    "Sharpness": partial(_adjust, function=F.adjust_sharpness),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
