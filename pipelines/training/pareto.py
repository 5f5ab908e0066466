"""The Pareto front of points whose figures are all better when higher, and the knee of a front."""

from __future__ import annotations

import math
from collections.abc import Sequence

BIN = 0.005  # figures in the same bin count as equal (Rao et al., ICCV 2023, section 4)

Point = Sequence[float]


def front(points: Sequence[Point], width: float = BIN) -> list[int]:
    """Returns the indices of the Pareto-optimal points.

    A point is Pareto-optimal if no other point is better in one figure and at least as good in all others.

    Args:
        points: points with the same number of figures. A figure that is not finite is worse than any number.
        width: width of the bins in which figures are compared. The first of several points with equal bins
            stands for all of them.
    """
    binned = [tuple(_bin(value, width) for value in point) for point in points]
    return [
        index
        for index, point in enumerate(binned)
        if not any(_dominates(other, point) for other in binned) and point not in binned[:index]
    ]


def _bin(value: float, width: float) -> float:
    return math.floor(value / width + 1e-9) if math.isfinite(value) else -math.inf


def _dominates(one: Point, other: Point) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def knee(points: Sequence[Point]) -> int:
    """Returns the index of the point nearest to the best value of every figure, the first of equals.

    Each figure is scaled to [0, 1] over the points. A figure that is not finite counts like the worst value.
    """
    scaled = [_shortfalls(column) for column in zip(*points, strict=True)]
    distances = [sum(missing**2 for missing in row) for row in zip(*scaled, strict=True)]
    return distances.index(min(distances))


def _shortfalls(values: Sequence[float]) -> list[float]:
    """Returns the distance of each value to the best one, divided by that of the worst to the best."""
    finite = [value for value in values if math.isfinite(value)]
    best, span = max(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    return [((best - value) / span if span else 0.0) if math.isfinite(value) else 1.0 for value in values]
