"""Transforms of an image, and with it of its boxes, its mask and its stored map.

A sample's *views* are a dict of tensors of the same height and width: `image` uint8 (3, H, W) and, if the sample has them,
`boxes` (`tv_tensors.BoundingBoxes`, XYXY), `mask` (`tv_tensors.Mask`) and `stored_map`. A step takes the views and a random
generator and gives new views; torchvision moves each kind of view in its own way. All random numbers come from that generator,
none from torch's: a sample's augmentation depends on its own seed alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.data.loading.rand_augment import rand_augment
from pipelines.params import DataParams

Views = dict[str, torch.Tensor]
Step = Callable[[Views, random.Random], Views]

SCALE = (0.08, 1.0)  # share of the image's area in a random crop (Szegedy et al. 2015, section 6)
RATIO = (3 / 4, 4 / 3)  # its width over its height
CROP_DRAWS = 10
STORED_MAP = "stored_map"  # name of the view that is a teacher's map, float (C, H, W)


def train_transform(params: DataParams, stored_map: bool = False) -> Step:
    """The augmentation that `params.augment` names, to square views of `image_size`. Picklable.

    `flip` comes after the fixed view of evaluation, `pad_crop_flip` (CIFAR) after a plain resize, and
    `random_resized_crop_flip` (ImageNet) takes its crop from the whole image. Each mirrors every second image. RandAugment
    comes last, if `params.rand_augment` gives its magnitude.

    With `stored_map` the views include a stored map (C, h, w), which belongs to the fixed view of the image, not to the image:
    map and fixed view are brought to one size first, and then take the same random crop and flip.
    """
    size = params.image_size
    first: tuple[Step, ...]
    drawn: tuple[Step, ...]
    match params.augment:
        case "none":
            first, drawn = _fixed_view(params), ()
        case "flip":
            first, drawn = _fixed_view(params), (flip,)
        case "pad_crop_flip":
            first, drawn = (
                (partial(resize_square, size=size),),
                (partial(pad_crop, padding=params.crop_padding), flip),
            )
        case "random_resized_crop_flip":
            first, drawn = (), (partial(random_resized_crop, size=size), flip)
    if params.rand_augment is not None:
        if stored_map:
            raise ValueError(
                "rand_augment changes an image in ways that its stored map does not follow: leave it out"
            )
        drawn = (*drawn, partial(rand_augment, magnitude=params.rand_augment))
    return (
        partial(_with_stored_map, _fixed_view(params), drawn)
        if stored_map
        else partial(apply, (*first, *drawn))
    )


def _with_stored_map(
    fixed: tuple[Step, ...], drawn: tuple[Step, ...], views: Views, rng: random.Random
) -> Views:
    """`fixed` applied to all views but the stored map, then `drawn` to all views."""
    others = apply(fixed, {name: view for name, view in views.items() if name != STORED_MAP}, rng)
    size = list(_size(others))
    stored = F.resize(views[STORED_MAP], size, interpolation=InterpolationMode.BILINEAR, antialias=False)
    return apply(drawn, {**others, STORED_MAP: stored}, rng)


def eval_transform(params: DataParams) -> Step:
    """The fixed view: shorter side resized to `eval_resize` and centre-cropped, or resized straight to `image_size`."""
    return partial(apply, _fixed_view(params))


def apply(steps: tuple[Step, ...], views: Views, rng: random.Random) -> Views:
    """`steps` one after the other."""
    for step in steps:
        views = step(views, rng)
    return views


def resize_square(views: Views, rng: random.Random, *, size: int) -> Views:
    """Views of size x size."""
    return _resize(views, size, size)


def resize_shorter(views: Views, rng: random.Random, *, size: int) -> Views:
    """Views whose shorter side is `size`, with the same aspect ratio; the longer side is rounded down."""
    height, width = _size(views)
    shorter = min(height, width)
    return _resize(views, height * size // shorter, width * size // shorter)


def centre_crop(views: Views, rng: random.Random, *, size: int) -> Views:
    """The central size x size pixels; a smaller image is padded with black."""
    height, width = _size(views)
    return _crop(views, round((height - size) / 2), round((width - size) / 2), size, size)


def flip(views: Views, rng: random.Random) -> Views:
    """Views mirrored left to right with probability 1/2."""
    return _each(views, F.horizontal_flip) if rng.random() < 0.5 else views


def pad_crop(views: Views, rng: random.Random, *, padding: int) -> Views:
    """A random crop of the same size out of views that are padded with `padding` pixels of black on each side."""
    height, width = _size(views)
    top, left = rng.randint(-padding, padding), rng.randint(-padding, padding)
    return _crop(views, top, left, height, width)


def random_resized_crop(views: Views, rng: random.Random, *, size: int) -> Views:
    """A crop of random area (`SCALE`) and shape (`RATIO`), resized to size x size (Szegedy et al. 2015, section 6).

    If none of `CROP_DRAWS` draws fits into the image, the crop has the largest size of an allowed shape.
    """
    height, width = _size(views)
    crop_height, crop_width = _crop_size(height, width, rng)
    top = rng.randint(0, height - crop_height)
    left = rng.randint(0, width - crop_width)
    return _resize(_crop(views, top, left, crop_height, crop_width), size, size)


def _crop_size(height: int, width: int, rng: random.Random) -> tuple[int, int]:
    """Height and width of a random crop, at most those of the image."""
    for _ in range(CROP_DRAWS):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            return crop_height, crop_width
    least, most = RATIO
    return min(height, max(1, round(width / least))), min(width, max(1, round(height * most)))


def _fixed_view(params: DataParams) -> tuple[Step, ...]:
    """The steps of `eval_transform`."""
    if params.eval_resize is None:
        return (partial(resize_square, size=params.image_size),)
    return (partial(resize_shorter, size=params.eval_resize), partial(centre_crop, size=params.image_size))


def _size(views: Views) -> tuple[int, int]:
    """Height and width, pixels."""
    height, width = views["image"].shape[-2:]
    return height, width


def _each(views: Views, function: Callable[..., Any], *arguments: Any) -> Views:
    """`function` applied to each view."""
    return {name: function(view, *arguments) for name, view in views.items()}


def _crop(views: Views, top: int, left: int, height: int, width: int) -> Views:
    """Views cropped to a window, zero where it lies outside them. Boxes are clipped to it."""
    if (top, left, height, width) == (0, 0, *_size(views)):
        return views
    return _each(views, F.crop, top, left, height, width)


def _resize(views: Views, height: int, width: int) -> Views:
    """Views of height x width: images bilinear with antialiasing, masks by the nearest pixel centre."""
    if (height, width) == _size(views):
        return views

    def resized(view: torch.Tensor) -> torch.Tensor:
        mask = isinstance(view, tv_tensors.Mask)
        mode = InterpolationMode.NEAREST_EXACT if mask else InterpolationMode.BILINEAR
        return F.resize(view, [height, width], interpolation=mode, antialias=not mask)

    return _each(views, resized)
