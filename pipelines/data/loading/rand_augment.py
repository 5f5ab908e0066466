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


def _shear(view: torch.Tensor, strength: float, axis: int) -> torch.Tensor:
    """Sheared by up to 0.3 pixels a pixel, along width (axis 0) or height (1), the upper left corner staying."""
    degrees = [0.0, 0.0]
    degrees[axis] = math.degrees(math.atan(0.3 * strength))
    return F.affine(view, 0.0, [0, 0], 1.0, degrees, interpolation=_BILINEAR, center=[0.0, 0.0])


def _translate(view: torch.Tensor, strength: float, axis: int) -> torch.Tensor:
    """Moved by up to 150/331 of the width (axis 0) or height (1)."""
    pixels = [0, 0]
    pixels[axis] = int(150 / 331 * strength * F.get_size(view)[1 - axis])
    return F.affine(view, 0.0, pixels, 1.0, [0.0, 0.0], interpolation=_BILINEAR)


# Operations of a view and a strength in [-1, 1]: those that move all views, and those of the image alone.
_MOVES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "ShearX": partial(_shear, axis=0),
    "ShearY": partial(_shear, axis=1),
    "TranslateX": partial(_translate, axis=0),
    "TranslateY": partial(_translate, axis=1),
    "Rotate": lambda view, strength: F.rotate(
        view, 30 * strength, interpolation=_BILINEAR
    ),  # degrees, about the centre
}
_COLOURS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "Identity": lambda image, strength: image,
    "Brightness": lambda image, strength: F.adjust_brightness(image, 1 + 0.9 * strength),
    "Color": lambda image, strength: F.adjust_saturation(image, 1 + 0.9 * strength),
    "Contrast": lambda image, strength: F.adjust_contrast(image, 1 + 0.9 * strength),
    "Sharpness": lambda image, strength: F.adjust_sharpness(image, 1 + 0.9 * strength),
    "Posterize": lambda image, strength: F.posterize(
        image, round(8 - 4 * abs(strength))
    ),  # the upper 8 to 4 of 8 bits stay
    "Solarize": lambda image, strength: F.solarize(
        image, 255 * (1 - abs(strength))
    ),  # inverted from this value on
    "AutoContrast": lambda image, strength: F.autocontrast(
        image
    ),  # each channel stretched to the whole range
    "Equalize": lambda image, strength: F.equalize(image),  # each channel with a flat histogram
}
