"""The ten background textures of `scenes`: the mix of two colours as a function of the pixel.

S is the image's side in pixels. A texture takes the turned and shifted coordinates u and v, each (S, S) in
pixels, and `unit` = S / 64, and returns the share (S, S) of the second colour, in [0, 1]. All arithmetic is
elementwise IEEE, so that the bits are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipelines.data.drawing.shapes import direction

Plane = NDArray[np.float64]  # (S, S)


def _zigzag(x: Plane) -> Plane:
    """The triangle wave with period 1 and values in [0, 1], 0 at the integers."""
    return 2.0 * np.abs(x - np.floor(x + 0.5))


def _swing(x: Plane) -> Plane:
    """A smooth wave with period 1 and values in [-1, 1], made of two parabolas, close to a sine."""
    t = 2.0 * (x - np.floor(x)) - 1.0
    return 4.0 * t * (1.0 - np.abs(t))


def _bands(x: Plane, period: float) -> Plane:
    """Antialiased bands of equal width across x; x and `period` in pixels, values in [0, 1]."""
    return np.clip((_zigzag(x / period) - 0.5) * period / 2.0 + 0.5, 0.0, 1.0)


def _stripes(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    return _bands(u, rng.uniform(6.0, 12.0) * unit)


def _checks(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    period = rng.uniform(9.0, 17.0) * unit
    across, along = _bands(u, period), _bands(v, period)
    return across + along - 2.0 * across * along


def _dots(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    period = rng.uniform(6.0, 11.0) * unit
    across, along = (_zigzag(u / period) - 1.0) * period / 2.0, (_zigzag(v / period) - 1.0) * period / 2.0
    return np.clip(
        period * rng.uniform(0.22, 0.32) - np.sqrt(across * across + along * along) + 0.5, 0.0, 1.0
    )


def _clouds(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    lattice = rng.random((32, 32))
    cell = rng.uniform(6.0, 11.0) * unit
    x, y = u / cell, v / cell
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = x - column, y - row
    fx, fy = fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy)
    corner = [[lattice[(row + j) % 32, (column + i) % 32] for i in (0, 1)] for j in (0, 1)]
    top = corner[0][0] + fx * (corner[0][1] - corner[0][0])
    bottom = corner[1][0] + fx * (corner[1][1] - corner[1][0])
    return np.clip(1.6 * (top + fy * (bottom - top)) - 0.3, 0.0, 1.0)


def _gradient(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    return _zigzag(u / (rng.uniform(110.0, 150.0) * unit))


def _waves(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    bend = rng.uniform(2.5, 4.5) * unit * _swing(v / (rng.uniform(18.0, 28.0) * unit))
    return _bands(u + bend, rng.uniform(8.0, 13.0) * unit)


def _bricks(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    height = rng.uniform(5.5, 9.0) * unit
    length, joint = height * 2.2, 0.8 * unit
    row = np.floor(v / height)
    shifted = u / length + 0.5 * (row - 2.0 * np.floor(row / 2.0))
    joint_distance = np.minimum(_zigzag(v / height) * height / 2.0, _zigzag(shifted) * length / 2.0)
    return np.clip(joint - joint_distance + 0.5, 0.0, 1.0)


def _chevrons(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    bend = rng.uniform(6.0, 9.0) * unit * _zigzag(v / (rng.uniform(12.0, 18.0) * unit))
    return _bands(u + bend, rng.uniform(8.0, 12.0) * unit)


def _ripples(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    return _bands(np.sqrt(u * u + v * v), rng.uniform(8.0, 13.0) * unit)


def _plaid(u: Plane, v: Plane, unit: float, rng: Generator) -> Plane:
    wide, narrow = rng.uniform(11.0, 18.0) * unit, rng.uniform(0.45, 0.55)
    across = 0.7 * _bands(u, wide) + 0.3 * _bands(u, wide * narrow)
    along = 0.7 * _bands(v, wide) + 0.3 * _bands(v, wide * narrow)
    return 0.5 * (across + along)


BACKGROUNDS: dict[str, Callable[[Plane, Plane, float, Generator], Plane]] = {
    "bricks": _bricks,
    "checks": _checks,
    "chevrons": _chevrons,
    "clouds": _clouds,
    "dots": _dots,
    "gradient": _gradient,
    "plaid": _plaid,
    "ripples": _ripples,
    "stripes": _stripes,
    "waves": _waves,
}


def texture(group: int, size: int, rng: Generator) -> Plane:
    """The texture number `group`, (size, size) in [0, 1], at a random angle, scale and offset."""
    centred = np.arange(size) + 0.5 - size / 2.0
    x, y = centred[None, :], centred[:, None]
    cos, sin = direction(rng.random())
    unit = size / 64.0
    shift_u, shift_v = ((rng.random() - 0.5) * size for _ in range(2))
    paint = list(BACKGROUNDS.values())[group]
    return paint(cos * x + sin * y + shift_u, cos * y - sin * x + shift_v, unit, rng)
