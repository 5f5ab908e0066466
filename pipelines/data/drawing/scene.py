"""Draws one image of `scenes`, as a pure function of the params, the split and the index.

Only the shape of an object determines its class. Colours, sizes, angles, places and textures are independent
of it, except that with probability `correlation` the background is the one of the first (largest) object's
class.

`render` also draws the same scene without some of its objects or of its clutter. All random numbers are drawn
in any case and what is removed is just not painted, so that every pixel that it does not cover stays the
same.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray

from pipelines.data.drawing.backgrounds import BACKGROUNDS, texture
from pipelines.data.drawing.captions import listed, sentences
from pipelines.data.drawing.shapes import SHAPES, Contours, coverage, direction, place
from pipelines.data.formats.png import encode_png
from pipelines.data.shards.sample import Box, Sample
from pipelines.params import ScenesParams

CLASSES = tuple(SHAPES)
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (35, 35, 40),
    "blue": (45, 90, 205),
    "brown": (135, 85, 50),
    "green": (60, 155, 70),
    "grey": (135, 135, 140),
    "orange": (235, 140, 45),
    "pink": (240, 145, 185),
    "purple": (135, 70, 170),
    "red": (205, 50, 50),
    "turquoise": (60, 190, 190),
    "white": (232, 230, 225),
    "yellow": (235, 215, 75),
}
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Colours are in levels of 0 to 255
_JITTER = 22.0  # largest deviation from a named colour, per channel
_TEXTURE = (0.3, 0.7)  # the background's second colour lies this far from the first towards a third colour
_CONTRAST = 90.0  # least Euclidean distance of an object's colour from both colours of the background
_TURN = 0.11  # largest rotation of an object in either direction, in turns
_SQUEEZE = 0.8  # least ratio of a squeezed object's short side to its long side
_LEAST_VISIBLE = 0.4  # least share of an object's pixels that no other object hides
_NOISE = 7.0  # half width of the uniform sensor noise
_SENTENCES = 1  # number of the separate generator for captions, so that captions do not change the pixels


@dataclass(frozen=True, slots=True)
class _Object:
    """Class, place and outline of one object, without its colour; in pixels."""

    label: int
    centre: tuple[float, float]
    radius: float
    outline: Contours


@dataclass(frozen=True, slots=True)
class Element:
    """An object or a piece of clutter of one scene.

    Attributes:
        kind: clutter is a thin quadrilateral behind all objects, which belongs to no class.
        number: from 1, in the order of painting; for objects the instance id in the mask.
    """

    kind: Literal["object", "clutter"]
    number: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One rendered image and all that was drawn for it, elements that were not painted included.

    Attributes:
        pixels: uint8 (S, S, 3).
        mask: uint8 (S, S), 0 is background and i the i-th object, where it is painted and visible.
        labels: class of each object, in the order of painting.
        colours: name of each object's colour.
        group: index of the background in `BACKGROUNDS`.
        clutter: number of pieces of clutter.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    labels: tuple[int, ...]
    colours: tuple[str, ...]
    group: int
    clutter: int

    @property
    def elements(self) -> list[Element]:
        """All objects, then all pieces of clutter."""
        counts: dict[Literal["object", "clutter"], int] = {
            "object": len(self.labels),
            "clutter": self.clutter,
        }
        return [Element(kind, number) for kind, count in counts.items() for number in range(1, count + 1)]


def key_of(split: Split, index: int) -> str:
    """Key of the sample of image number `index` of `split`."""
    return f"{split}-{index:07d}"


def place_of(key: str) -> tuple[Split, int]:
    """Split and index of the image with this key, the arguments of `draw` and `render`.

    Raises:
        ValueError: no drawn image has such a key.
    """
    found = re.fullmatch(rf"({'|'.join(SPLITS)})-(\d{{7,}})", key)
    if found is None:
        raise ValueError(f"{key!r} is not the key of a drawn image, such as {key_of('test', 12)!r}")
    return found[1], int(found[2])  # type: ignore[return-value]


def draw(params: ScenesParams, split: Split, index: int) -> Sample:
    """Image number `index` of `split`, with its boxes, mask, captions and group (its background)."""
    scene = render(params, split, index)
    boxes = tuple(_box(label, scene.mask == number) for number, label in enumerate(scene.labels, start=1))
    named = [(colour, CLASSES[label]) for colour, label in zip(scene.colours, scene.labels, strict=True)]
    background = list(BACKGROUNDS)[scene.group]
    captions: tuple[str, ...] = (
        f"{listed([f'{colour} {shape}' for colour, shape in named])} on {background}",
    )
    if params.captions:
        drawn = _generator(params.seed, split, index, _SENTENCES)
        captions = sentences(named, background, drawn, params.caption_detail)
    multiclass = params.variant == "objects"
    return Sample(
        key=key_of(split, index),
        image=encode_png(scene.pixels),
        extension="png",
        label=scene.labels[0] if multiclass else None,
        labels=None if multiclass else tuple(sorted(set(scene.labels))),
        boxes=boxes,
        group=scene.group,
        captions=captions,
        mask=encode_png(scene.mask),
    )


def render(params: ScenesParams, split: Split, index: int, without: Collection[Element] = ()) -> Scene:
    """Image number `index` of `split`, without the elements `without`.

    Background, the other elements, their order, exposure and noise stay the same. What a removed element hid
    is visible. With nothing removed, the pixels are those of `draw`.

    Raises:
        ValueError: the scene has no such element.
    """
    rng = _generator(params.seed, split, index)
    size = params.image_size
    labels = _labels(params, split, index, rng)
    objects = _layout(labels, size, rng)
    group = int(rng.integers(len(BACKGROUNDS)))
    if rng.random() < params.correlation.get(split, 0.0):
        group = objects[0].label
    _, first_rgb = _colour(rng)
    second_rgb = first_rgb + rng.uniform(*_TEXTURE) * (_colour(rng, first_rgb)[1] - first_rgb)
    colours = [_colour(rng, first_rgb, second_rgb) for _ in objects]

    mix = texture(group, size, rng)[..., None]
    canvas = first_rgb * (1.0 - mix) + second_rgb * mix
    clutter = int(rng.integers(2, 6))
    _clutter(canvas, rng, clutter, {element.number for element in without if element.kind == "clutter"})
    mask = np.zeros((size, size), np.uint8)
    for instance, (item, (_, rgb)) in enumerate(zip(objects, colours, strict=True), start=1):
        shaded = rgb * _shading(item, size, rng)
        if Element("object", instance) not in without:
            inside = coverage(item.outline, size)
            _paint(canvas, inside, shaded)
            mask[inside >= 0.5] = instance
    scene = Scene(
        _photograph(canvas, rng), mask, tuple(labels), tuple(name for name, _ in colours), group, clutter
    )
    if unknown := set(without).difference(scene.elements):
        element = min(unknown, key=lambda each: (each.kind, each.number))
        raise ValueError(
            f"{key_of(split, index)}: no {element.kind} {element.number} to remove; "
            f"there are {len(labels)} objects and {clutter} pieces of clutter"
        )
    return scene


def _generator(seed: int, split: Split, *rest: int) -> Generator:
    """The generator of one image (`rest` is its index), or, with more numbers, of a block or the captions."""
    return Generator(Philox(SeedSequence([seed, SPLITS.index(split), *rest])))


def _labels(params: ScenesParams, split: Split, index: int, rng: Generator) -> list[int]:
    """A class per object. In each block of ten images every class comes first once, which balances splits."""
    block, position = divmod(index, len(CLASSES))
    shuffled = _generator(params.seed, split, block, len(CLASSES)).permutation(len(CLASSES))
    least, most = params.objects_per_image
    others = int(rng.integers(least, most + 1)) - 1
    return [int(shuffled[position]), *(int(label) for label in rng.integers(len(CLASSES), size=others))]


def _layout(labels: list[int], size: int, rng: Generator) -> list[_Object]:
    """One object per label, the largest first, so that smaller objects lie on top.

    The layout is drawn again, a little smaller each time, until enough of every object is visible.
    """
    largest = size * (0.38 if len(labels) == 1 else 0.28)
    while True:
        radii = np.sort(rng.uniform(0.55, 1.0, len(labels)))[::-1] * largest
        placed = []
        for label, radius in zip(labels, radii.tolist(), strict=True):
            x, y = rng.uniform(0.8 * radius, size - 0.8 * radius, 2).tolist()
            outline = place(SHAPES[CLASSES[label]], (x, y), _pose(radius, rng))
            placed.append(_Object(label, (x, y), radius, outline))
        if _visible([item.outline for item in placed], size):
            return placed
        largest = max(0.95 * largest, 3.0)


def _pose(radius: float, rng: Generator) -> NDArray[np.float64]:
    """The linear map (2, 2) of a shape: a squeeze along a random direction, a turn, and the size."""
    axis, turn = rng.random(), rng.uniform(-_TURN, _TURN)
    (a, b), (c, d) = direction(turn + axis), direction(axis)
    long, short = radius, radius * rng.uniform(_SQUEEZE, 1.0)
    # Rotation · diagonal · rotation, written out, because BLAS may fuse operations and so round differently
    return np.array(
        [
            [a * long * c + b * short * d, a * long * d - b * short * c],
            [b * long * c - a * short * d, b * long * d + a * short * c],
        ]
    )


def _visible(outlines: list[Contours], size: int) -> bool:
    """True if later objects leave `_LEAST_VISIBLE` of each object's pixels in the image uncovered."""
    top = np.zeros((size, size), np.uint8)
    areas = []
    for instance, outline in enumerate(outlines, start=1):
        inside = coverage(outline, size) >= 0.5
        top[inside] = instance
        areas.append(np.count_nonzero(inside))
    seen = np.bincount(top.ravel(), minlength=len(outlines) + 1)[1:]
    return all(area > 0 and pixels >= _LEAST_VISIBLE * area for area, pixels in zip(areas, seen, strict=True))


def _colour(rng: Generator, *unlike: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """Name and jittered RGB levels of a random colour, at least `_CONTRAST` away from those in `unlike`."""
    names = list(COLOURS)
    while True:
        name = names[int(rng.integers(len(names)))]
        rgb = np.array(COLOURS[name]) + rng.uniform(-_JITTER, _JITTER, 3)
        if all(float(np.sqrt(((rgb - other) ** 2).sum())) >= _CONTRAST for other in unlike):
            return name, rgb


def _clutter(canvas: NDArray[np.float64], rng: Generator, count: int, without: Collection[int]) -> None:
    """Paints `count` small quadrilaterals that belong to no class, except the numbers `without` (from 1)."""
    size = len(canvas)
    for number in range(1, count + 1):
        centre = tuple(rng.uniform(0.0, size, 2).tolist())
        length, width = rng.uniform(0.03, 0.14) * size, rng.uniform(0.008, 0.022) * size
        cos, sin = direction(rng.random())
        corners = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]) + rng.uniform(
            -0.4, 0.4, (4, 2)
        )
        outline = place(
            (corners,), centre, np.array([[length * cos, -width * sin], [length * sin, width * cos]])
        )
        _, rgb = _colour(rng)
        if number not in without:
            _paint(canvas, coverage(outline, size), rgb)


def _paint(canvas: NDArray[np.float64], opacity: NDArray[np.float64], rgb: NDArray[np.float64]) -> None:
    """Blends a colour, (3,) or (H, W, 3), into the canvas (H, W, 3) with `opacity` (H, W)."""
    canvas += opacity[..., None] * (rgb - canvas)


def _shading(item: _Object, size: int, rng: Generator) -> NDArray[np.float64]:
    """Brightness (H, W, 1) of light that falls on the object from a random side, in [0.78, 1.22]."""
    cos, sin = direction(rng.random())
    steps = np.arange(size) + 0.5
    across = (cos * (steps - item.centre[0])[None, :] + sin * (steps - item.centre[1])[:, None]) / item.radius
    return (1.0 + 0.22 * np.clip(across, -1.0, 1.0))[..., None]


def _photograph(canvas: NDArray[np.float64], rng: Generator) -> NDArray[np.uint8]:
    """The canvas with random exposure and sensor noise, as 8-bit pixels."""
    grain = rng.integers(0, 256, canvas.shape, np.uint8).astype(np.float64) / 127.5 - 1.0
    return np.clip(np.rint(canvas * rng.uniform(0.8, 1.1) + _NOISE * grain), 0, 255).astype(np.uint8)


def _box(label: int, visible: NDArray[np.bool_]) -> Box:
    """The tight half-open box of a mask (H, W)."""
    columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    return label, float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
