"""The shapes of `scenes` as contours, and their antialiased fill.

All arithmetic is elementwise IEEE, and results of trigonometric functions are rounded. So a fill has the same
bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (P, 2): x, y
Contours = tuple[Points, ...]  # closed polygons; a hole has the opposite orientation

_SUBROWS = 8  # scan lines per pixel row; along each scan line the coverage is exact
_ARC = 40  # points on a full circle


def direction(angle: float) -> tuple[float, float]:
    """(cos, sin) of an angle in turns, rounded so that the result does not depend on the C library."""
    return round(math.cos(math.tau * angle), 12), round(math.sin(math.tau * angle), 12)


def _polar(radius_and_turn: Sequence[tuple[float, float]]) -> Points:
    """Points from polar coordinates (radius, angle in turns)."""
    return np.array([[radius * axis for axis in direction(turn)] for radius, turn in radius_and_turn])


def _regular(corners: int, radius: float = 1.0) -> Points:
    """A regular polygon with one corner at the top."""
    return _polar([(radius, k / corners - 0.25) for k in range(corners)])


def _star(points: int, inner: float) -> Points:
    """A star with outer radius 1."""
    return _polar([(1.0 if k % 2 == 0 else inner, k / (2 * points) - 0.25) for k in range(2 * points)])


def _crescent() -> Points:
    """A disc of radius 1 minus a disc of radius 0.85 with its centre 0.5 to the right, shifted by 0.15."""
    shift, inner = 0.5, 0.85
    crossing = (1 + shift**2 - inner**2) / (2 * shift)  # x where the two circles meet
    outer_half = math.acos(crossing) / math.tau
    inner_half = math.acos((crossing - shift) / inner) / math.tau
    steps = np.linspace(0.0, 1.0, _ARC // 2).tolist()
    outer = _polar([(1.0, outer_half + t * (1 - 2 * outer_half)) for t in steps])
    bite = _polar([(inner, 1 - inner_half - t * (1 - 2 * inner_half)) for t in steps[1:-1]]) + np.array(
        [shift, 0.0]
    )
    return np.concatenate([outer, bite]) + np.array([0.15, 0.0])


def _heart() -> Points:
    """The curve x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, upright, centred, over 16."""
    points = []
    for k in range(_ARC):
        cosines = [direction(m * k / _ARC)[0] for m in range(5)]
        height = 13 * cosines[1] - 5 * cosines[2] - 2 * cosines[3] - cosines[4]
        points.append([16 * direction(k / _ARC)[1] ** 3, -height - 2.5])
    return np.array(points) / 16.0


def _cross(arm: float) -> Points:
    """A plus sign whose arms have half width `arm`."""
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points = []
    for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        points += [(cos * x - sin * y, sin * x + cos * y) for x, y in quarter]
    return np.array(points)


_ARROW = np.array(
    [(1.0, 0.0), (0.15, -0.8), (0.15, -0.3), (-1.0, -0.3), (-1.0, 0.3), (0.15, 0.3), (0.15, 0.8)]
)
_SQUARE = np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])

SHAPES: dict[str, Contours] = {
    "arrow": (_ARROW,),
    "circle": (_regular(_ARC, 0.92),),
    "crescent": (_crescent(),),
    "cross": (_cross(0.33),),
    "heart": (_heart(),),
    "hexagon": (_regular(6),),
    "ring": (_regular(_ARC, 0.95), _regular(_ARC, 0.52)[::-1]),
    "square": (_SQUARE,),
    "star": (_star(5, 0.45),),
    "triangle": (_regular(3, 1.1),),
}


def place(contours: Contours, centre: tuple[float, float], matrix: NDArray[np.float64]) -> Contours:
    """The contours after the linear map `matrix` (2, 2) and the shift to `centre` (x, y) in pixels."""
    (a, b), (c, d) = matrix.tolist()
    x, y = centre
    return tuple(
        np.stack([a * p[:, 0] + b * p[:, 1] + x, c * p[:, 0] + d * p[:, 1] + y], axis=1).round(6)
        for p in contours
    )


def coverage(contours: Contours, size: int) -> NDArray[np.float64]:
    """The share in [0, 1] of each pixel of a (size, size) image that lies inside the contours.

    Where a scan line crosses an edge, the coverage of everything to the right changes by ±1 / _SUBROWS. This
    step is split between the pixel of the crossing, in proportion to its part right of the crossing, and the
    next pixel. The cumulative sum along a row is then the covered share.
    """
    start = np.concatenate(contours)
    end = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours])
    (x0, y0), (x1, y1) = start.T, end.T
    upper, lower = np.minimum(y0, y1), np.maximum(y0, y1)
    first = np.clip(np.ceil(upper * _SUBROWS - 0.5), 0, size * _SUBROWS).astype(np.int64)
    last = np.clip(np.ceil(lower * _SUBROWS - 0.5), 0, size * _SUBROWS).astype(np.int64)
    lines = last - first
    edge = np.repeat(np.arange(len(lines)), lines)
    line = np.arange(len(edge)) - np.repeat(np.cumsum(lines) - lines, lines) + first[edge]
    rise = np.where(lines > 0, y1 - y0, 1.0)
    crossing = x0[edge] + ((line + 0.5) / _SUBROWS - y0[edge]) * ((x1 - x0) / rise)[edge]
    crossing = np.clip(crossing, 0.0, size)
    column = np.floor(crossing).astype(np.int64)
    beyond = crossing - column
    sign = np.sign(rise)[edge] / _SUBROWS
    cell = (line // _SUBROWS) * (size + 2) + column
    cells = size * (size + 2)
    steps = np.bincount(cell, sign * (1.0 - beyond), cells) + np.bincount(cell + 1, sign * beyond, cells)
    return np.minimum(np.abs(np.cumsum(steps.reshape(size, size + 2), axis=1)[:, :size]), 1.0)
