"""Transforms of an image together with its boxes, mask and stored map, so that they stay aligned.

A sample's *views* are a dict of tensors of one height and width: `image` uint8 (3, H, W) and, if the sample
has them, `boxes` (`tv_tensors.BoundingBoxes`, XYXY), `mask` (`tv_tensors.Mask`) and `stored_map` (C, H, W). A
*step* takes views and a random generator and returns new views. Torchvision dispatches on the kind of each
view. All random numbers come from that generator, so that the augmentation depends on the sample's seed
alone.
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

RATIO = (3 / 4, 4 / 3)  # width over height of a random crop
CROP_DRAWS = 10  # attempts to draw a crop that fits into the image
STORED_MAP = "stored_map"  # name of the view with a teacher's map, float (C, H, W)


def train_transform(params: DataParams, stored_map: bool = False) -> Step:
    """The training augmentation `params.augment`, to square views of `image_size`. Picklable.

    `flip` follows the fixed view of evaluation. `pad_crop_flip` (CIFAR) follows a plain resize.
    `random_resized_crop_flip` (ImageNet) crops from the whole image. Each flips with probability 1/2.
    RandAugment comes last if `params.rand_augment` is set.

    With `stored_map`, the views include a stored map (C, h, w), which was computed on the fixed view of
    evaluation (`eval_transform`). The image is therefore brought to the fixed view and the map to its size.
    Then both take the same random crop and flip.
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
            first, drawn = (), (partial(random_resized_crop, size=size, smallest=params.crop_scale), flip)
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
    """Applies `fixed` to the other views, resizes the stored map to them, then applies `drawn` to all."""
    others = apply(fixed, {name: view for name, view in views.items() if name != STORED_MAP}, rng)
    size = list(_size(others))
    stored = F.resize(views[STORED_MAP], size, interpolation=InterpolationMode.BILINEAR, antialias=False)
    return apply(drawn, {**others, STORED_MAP: stored}, rng)


def eval_transform(params: DataParams) -> Step:
    """The fixed view of evaluation, `image_size` pixels square.

    The shorter side is resized to `eval_resize` and the centre cropped; if `eval_resize` is `None`, the image
    is resized straight to the square.
    """
    return partial(apply, _fixed_view(params))


def apply(steps: tuple[Step, ...], views: Views, rng: random.Random) -> Views:
    """Applies `steps` in order."""
    for step in steps:
        views = step(views, rng)
    return views


def resize_square(views: Views, rng: random.Random, *, size: int) -> Views:
    """Resizes to size x size, ignoring the aspect ratio."""
    return _resize(views, size, size)


def resize_shorter(views: Views, rng: random.Random, *, size: int) -> Views:
    """Resizes the shorter side to `size` and keeps the aspect ratio; the longer side is rounded down."""
    height, width = _size(views)
    shorter = min(height, width)
    return _resize(views, height * size // shorter, width * size // shorter)


def centre_crop(views: Views, rng: random.Random, *, size: int) -> Views:
    """Crops the central size x size pixels; pads smaller images with black."""
    height, width = _size(views)
    return _crop(views, round((height - size) / 2), round((width - size) / 2), size, size)


def flip(views: Views, rng: random.Random) -> Views:
    """Mirrors left to right with probability 1/2."""
    return _each(views, F.horizontal_flip) if rng.random() < 0.5 else views


def pad_crop(views: Views, rng: random.Random, *, padding: int) -> Views:
    """Pads each side with `padding` black pixels and crops randomly to the former size."""
    height, width = _size(views)
    top, left = rng.randint(-padding, padding), rng.randint(-padding, padding)
    return _crop(views, top, left, height, width)


def random_resized_crop(views: Views, rng: random.Random, *, size: int, smallest: float) -> Views:
    """Crops a share of the area in [smallest, 1], with an aspect ratio in `RATIO`, and resizes the crop.

    If none of `CROP_DRAWS` draws fits into the image, the crop is the largest of an allowed aspect ratio.

    Source: Szegedy et al. 2015, section 6 (there, `smallest` is 0.08).
    """
    height, width = _size(views)
    crop_height, crop_width = _crop_size(height, width, smallest, rng)
    top = rng.randint(0, height - crop_height)
    left = rng.randint(0, width - crop_width)
    return _resize(_crop(views, top, left, crop_height, crop_width), size, size)


def _crop_size(height: int, width: int, smallest: float, rng: random.Random) -> tuple[int, int]:
    """Draws height and width of a crop that fits into the image."""
    for _ in range(CROP_DRAWS):
        area = height * width * rng.uniform(smallest, 1)
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
    """Height and width of the views, pixels."""
    height, width = views["image"].shape[-2:]
    return height, width


def _each(views: Views, function: Callable[..., Any], *arguments: Any) -> Views:
    return {name: function(view, *arguments) for name, view in views.items()}


def _crop(views: Views, top: int, left: int, height: int, width: int) -> Views:
    """Crops to a window and pads with zeros where it lies outside. Boxes are clipped to it."""
    if (top, left, height, width) == (0, 0, *_size(views)):
        return views
    return _each(views, F.crop, top, left, height, width)


def _resize(views: Views, height: int, width: int) -> Views:
    """Resizes masks by the nearest pixel centre and all other views bilinearly with antialiasing."""
    if (height, width) == _size(views):
        return views

    def resized(view: torch.Tensor) -> torch.Tensor:
        mask = isinstance(view, tv_tensors.Mask)
        mode = InterpolationMode.NEAREST_EXACT if mask else InterpolationMode.BILINEAR
        return F.resize(view, [height, width], interpolation=mode, antialias=not mask)

    return _each(views, resized)
