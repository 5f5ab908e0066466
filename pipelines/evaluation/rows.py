"""Scores as rows: plain dicts, one per image, model, class and explanation.

A row has `key` of the image, `model`, `class` (index) and `explanation`, and its scores as floats. A score
that is undefined for it is absent.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pipelines.metrics import measured

Row = dict[str, Any]
WHERE = ("key", "model", "class", "explanation")


def row(key: str, model: str, label: int, explanation: str, scores: Mapping[str, Any]) -> Row:
    """A row of the finite `scores`."""
    return dict(zip(WHERE, (key, model, label, explanation), strict=True)) | measured(scores)


def image_means(rows: Iterable[Row], score: str) -> dict[str, float]:
    """Key of the image -> mean of `score` over the rows of the image that have it, sorted by key."""
    found: dict[str, list[float]] = {}
    for each in rows:
        if score in each:
            found.setdefault(each["key"], []).append(each[score])
    return {key: statistics.fmean(found[key]) for key in sorted(found)}


def mean_scores(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> explanation -> score -> mean over images, and `<score>_images`, the number of these images.

    Images with several classes have the same weight as others.
    """
    groups: dict[str, dict[str, list[Row]]] = {}
    for each in rows:
        groups.setdefault(each["model"], {}).setdefault(each["explanation"], []).append(each)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, explanations in groups.items():
        found[model] = {name: {} for name in explanations}
        for name, some in explanations.items():
            for score in dict.fromkeys(score for each in some for score in each if score not in WHERE):
                values = image_means(some, score)
                found[model][name] |= {
                    score: statistics.fmean(values.values()),
                    f"{score}_images": len(values),
                }
    return found


def sampled(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers 0 to total - 1 (all if there are fewer), drawn by `seed`, in ascending order."""
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return drawn.sort().values.tolist()
