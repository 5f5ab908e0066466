"""The Pareto front of several figures, each the higher the better, and one point of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

BIN = 0.005  # figures in the same bin count as equal (Rao et al., ICCV 2023, section 5)

Point = Sequence[float]


def front(points: Sequence[Point], width: float = BIN) -> list[int]:
    """Indices of the points that no other beats: is better in one figure and at least as good in all.

    Args:
        points: (n) of equally many figures in [0, 1]; what is not finite is worse than any number.
        width: of the bins in which figures are compared; of points in the same bins the first one stands for all.
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
    """Index of the point nearest to the best value of every figure; first of equals.

    Each figure is scaled to [0, 1] over the points. What is not finite is as far from the best value as the worst one.
    """
    scaled = [_shortfalls(column) for column in zip(*points, strict=True)]
    distances = [sum(missing**2 for missing in row) for row in zip(*scaled, strict=True)]
    return distances.index(min(distances))


def _shortfalls(values: Sequence[float]) -> list[float]:
    """How far each value is from the best one, of the distance between the worst and the best."""
    finite = [value for value in values if math.isfinite(value)]
    best, span = max(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    return [((best - value) / span if span else 0.0) if math.isfinite(value) else 1.0 for value in values]
