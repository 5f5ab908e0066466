"""RandAugment: two random operations out of the fourteen of torchvision's v2, all of one magnitude.

Torchvision's implementation draws from torch's global generator and takes the image alone. This one draws
from the sample's generator, and geometric operations move boxes, mask and stored maps with the image.

Source: Cubuk et al., RandAugment, 2020.
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

OPERATIONS = 2  # per image
LARGEST = 30  # largest magnitude
_BILINEAR = InterpolationMode.BILINEAR


def rand_augment(views: Views, rng: random.Random, *, magnitude: int) -> Views:
    """Applies two random operations to `views`, which keep their size.

    Args:
        views: see `transforms`; `image` is uint8 (3, H, W).
        rng: the sample's generator.
        magnitude: in [0, 30]; the published runs take 10.
    """
    for name in rng.choices(list(_MOVES | _COLOURS), k=OPERATIONS):
        signed = magnitude / LARGEST * rng.choice((-1, 1))
        if name in _MOVES:
            views = {key: _MOVES[name](view, signed) for key, view in views.items()}
        else:
            views = {**views, "image": _COLOURS[name](views["image"], signed)}
    return views


def _shear(view: torch.Tensor, strength: float, axis: int) -> torch.Tensor:
    """Shears along width (axis 0) or height (1) by up to 0.3 pixels per pixel; the top left corner stays."""
    degrees = [0.0, 0.0]
    degrees[axis] = math.degrees(math.atan(0.3 * strength))
    return F.affine(view, 0.0, [0, 0], 1.0, degrees, interpolation=_BILINEAR, center=[0.0, 0.0])


def _translate(view: torch.Tensor, strength: float, axis: int) -> torch.Tensor:
    """Translates by up to 150/331 of the width (axis 0) or height (1)."""
    pixels = [0, 0]
    pixels[axis] = int(150 / 331 * strength * F.get_size(view)[1 - axis])
    return F.affine(view, 0.0, pixels, 1.0, [0.0, 0.0], interpolation=_BILINEAR)


# Functions of (view, strength in [-1, 1]). `_MOVES` apply to all views, `_COLOURS` to the image alone.
_MOVES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "ShearX": partial(_shear, axis=0),
    "ShearY": partial(_shear, axis=1),
    "TranslateX": partial(_translate, axis=0),
    "TranslateY": partial(_translate, axis=1),
    # In degrees, around the centre.
    "Rotate": lambda view, strength: F.rotate(view, 30 * strength, interpolation=_BILINEAR),
}
_COLOURS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "Identity": lambda image, strength: image,
    "Brightness": lambda image, strength: F.adjust_brightness(image, 1 + 0.9 * strength),
    "Color": lambda image, strength: F.adjust_saturation(image, 1 + 0.9 * strength),
    "Contrast": lambda image, strength: F.adjust_contrast(image, 1 + 0.9 * strength),
    "Sharpness": lambda image, strength: F.adjust_sharpness(image, 1 + 0.9 * strength),
    # Keeps the upper 8 to 4 of 8 bits.
    "Posterize": lambda image, strength: F.posterize(image, round(8 - 4 * abs(strength))),
    # Inverts values from the threshold on.
    "Solarize": lambda image, strength: F.solarize(image, 255 * (1 - abs(strength))),
    # Stretches each channel to the whole range.
    "AutoContrast": lambda image, strength: F.autocontrast(image),
    # Flattens the histogram of each channel.
    "Equalize": lambda image, strength: F.equalize(image),
}
