"""The direction in which each metric improves, in one place for search, selection and reports."""

from __future__ import annotations

from collections.abc import Sequence

HIGHER = frozenset(
    (
        *("accuracy", "accuracy_top5", "f1", "precision", "recall", "mean_average_precision", "agreement"),
        *(f"{kind}_{group}_accuracy" for kind in ("worst", "mean") for group in ("group", "class_group")),
        *("gridpg", "gridpg_own_grids", "epg", "on_object_epg", "size_corrected_epg", "iou", "iou_at_0.5"),
        *("explanation_similarity", "cosine"),
        *(f"{way}_recall_at_{top}" for way in ("image_to_text", "text_to_image") for top in (1, 5, 10)),
    )
)
LOWER = frozenset(("calibration_error", "unexplained_share", "unexplained_share_as_published"))
LOSSES = frozenset(("loss", "distillation", "explanation", "label", "classification", "localisation"))
SIZES = ("small", "medium", "large")  # suffixes for sizes of boxes: `epg_small` has the direction of `epg`


def higher_is_better(name: str) -> bool | None:
    """True if the metric `name`, such as `val/epg_small`, improves as it rises, False if as it falls.

    `None` if the direction is unknown. The metric classes' `higher_is_better` agrees. Losses
    (`train/distillation`, or any name that contains `loss`) improve as they fall.
    """
    group, _, metric = name.rpartition("/")
    stem, _, size = metric.rpartition("_")
    metric = stem if size in SIZES else metric
    if metric in HIGHER:
        return True
    falls = metric in LOWER or "loss" in metric or (group == "train" and metric in LOSSES)
    return False if falls else None


def rising(name: str, value: float) -> float:
    """Negates `value` if the metric `name` improves as it falls, so that higher is always better."""
    return -value if higher_is_better(name) is False else value


def with_arrows(names: Sequence[str]) -> list[str]:
    """Names for tables and plots, with `↓` behind those that improve as they fall."""
    return [f"{name} ↓" if higher_is_better(name) is False else name for name in names]
