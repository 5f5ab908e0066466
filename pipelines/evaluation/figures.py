"""The figures of an evaluation, computed from its records alone."""

from __future__ import annotations

from typing import Any

import pandas

from pipelines.evaluation.predictions import Predictions
from pipelines.evidence import Records
from pipelines.metrics import SIZES, Agreement, eligible, measured, multiclass_metrics

# Share of the image that the boxes cover: lower bound (exclusive), upper bound (inclusive).
BOX_SIZES = dict(zip(SIZES, ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0)), strict=True))


def figures(records: Records) -> dict[str, Any]:
    """Figures of the models, as `metrics.json` has them.

    Returns:
        `{"models": {name: {"accuracy", ..., "explanations": {name: {"gridpg", "epg", ...}}}}, "grids": {...},
        "images": N, "skipped": n}` with fractions in [0, 1]. Figures that could not be measured are absent.
        `iou` is at the threshold that is best on the validation split, `iou_at_0.5` at 0.5. Students also
        have `agreement` and `explanation_similarity`.
    """
    facts, predictions = records.facts, Predictions.of(records)
    teacher, found = facts["teacher"], {}
    for name in records.models:
        logits = predictions.logits[name]
        of_model: dict[str, Any] = {}
        single = facts["tasks"][name] == "multiclass"
        if single:
            of_model |= measured(multiclass_metrics(logits.shape[1])(logits, predictions.labels))
        if not single or facts["decisions"]:
            of_model |= predictions.decisions(name)
        of_model |= predictions.group_accuracies(name)
        if teacher not in (None, name):
            of_model |= measured({"agreement": Agreement()(logits, predictions.logits[teacher])})
            rows = records.predictions[records.predictions["model"] == name]
            of_model |= _similarity(rows)
        of_model["explanations"] = _explanations(records, name)
        if name in facts["windows"]:
            of_model["grid_windows"] = facts["windows"][name]
        found[name] = of_model
    results: dict[str, Any] = {
        "models": found,
        "images": len(predictions.keys),
        "skipped": facts["skipped"],
    }
    if facts["windows"]:
        correct = eligible(predictions.labels, *predictions.logits.values())
        shared = records.grids[records.grids["game"] == "gridpg"]
        count = int(shared["grid"].nunique())
        results["grids"] = {
            "side": facts["side"],
            "count": count,
            "eligible_images": int(correct.sum()),
        }
    return results


def _similarity(rows: pandas.DataFrame) -> dict[str, float]:
    """Mean similarity of explanations, and the number of images of which one map is zero."""
    if "explanation_similarity" not in rows or rows["empty_map"].isna().all():
        return {}
    defined = ~rows["empty_map"].astype(bool)
    return _score("explanation_similarity", rows["explanation_similarity"], defined)


def _explanations(records: Records, model: str) -> dict[str, dict[str, float]]:
    """Explanation -> figures of one model."""
    rows, grids = records.explanations, records.grids
    found: dict[str, dict[str, float]] = {}
    for name, of in rows[rows["model"] == model].groupby("explanation", sort=False):
        found[str(name)] = explanation_figures(of)
        played = grids[(grids["model"] == model) & (grids["explanation"] == name)]
        for game, of_game in played.groupby("game"):
            found[str(name)] |= measured({str(game): _mean(of_game["score"])})
    return found


def explanation_figures(rows: pandas.DataFrame) -> dict[str, float]:
    """Means over the rows of `Records.explanations` of one model and explanation, also by size of the boxes.

    `pairs` is the number of rows, (image, class) pairs, whose boxes cover a pixel's centre. The other rows
    are counted by `pairs_without_box` and `pairs_with_empty_boxes`. `<score>_undefined` counts the pairs for
    which a score is undefined: there is no energy or no union, or, for the size-corrected EPG, the boxes
    cover the whole image.
    """
    found = _unexplained(rows)
    if "boxed" not in rows or rows["boxed"].isna().all():
        return found
    boxed, shares = rows["boxed"].astype(bool), rows["box_share"]
    found |= {
        "pairs_without_box": int((~boxed).sum()),
        "pairs_with_empty_boxes": int((boxed & (shares == 0)).sum()),
    }
    found |= _localisation(rows)
    for size, (least, most) in BOX_SIZES.items():
        of_size = rows[(shares > least) & (shares <= most)]
        if len(of_size):
            found |= _localisation(of_size, f"_{size}")
    located = rows[shares > 0]
    at_half = _score("iou_at_0.5", located["iou_at_0.5"], located["has_union"])
    found |= {name: value for name, value in at_half.items() if name == "iou_at_0.5"}
    if "iou_threshold" in rows and rows["iou_threshold"].notna().all():
        found["iou_threshold"] = float(rows["iou_threshold"].iloc[0])
    return found


def pointing_figures(rows: pandas.DataFrame) -> dict[str, float]:
    """`box_share`, the EPG of a uniform map, and how often the map of a class points to its own object.

    `points_to_own` is a share of `points_to_own_pairs` ordered pairs of classes in one image; chance is
    `points_to_own_chance`. See `scores.pointing_to_own`.
    """
    found = measured({"box_share": _mean(rows["box_share"][rows["box_share"] > 0])})
    if pairs := int(rows["other_classes"].sum()):
        share = float(rows["pointed_to_own"].sum()) / pairs
        found |= {"points_to_own": share, "points_to_own_pairs": pairs, "points_to_own_chance": 0.5}
    return found


def _unexplained(rows: pandas.DataFrame) -> dict[str, float]:
    """Share of the logits, without their bias, that the contributions do not sum to: Σ|rest| / Σ|logit|."""
    names = {
        "unexplained_share": "contributions",
        "unexplained_share_as_published": "contributions_as_published",
    }
    found = {}
    for name, column in names.items():
        if column in rows and rows[column].notna().any():
            wanted = rows["logit"].astype("float64") - rows["logit_bias"]
            found[name] = float((wanted - rows[column]).abs().sum() / wanted.abs().sum())
    return measured(found)


def _localisation(rows: pandas.DataFrame, suffix: str = "") -> dict[str, float]:
    """EPG and IoU of rows, with the number of pairs and of undefined ones; names get the suffix."""
    located = rows[rows["box_share"] > 0]
    partly = located["box_share"] < 1
    found: dict[str, float] = {f"pairs{suffix}": len(located)}
    found |= _score(f"epg{suffix}", located["epg"], located["has_energy"])
    found |= _score(
        f"size_corrected_epg{suffix}", located["size_corrected_epg"], located["has_energy"], partly
    )
    if "object_share" in rows:
        shown = rows[rows["object_share"] > 0]
        found |= _score(f"on_object_epg{suffix}", shown["on_object_epg"], shown["has_energy"])
    if "iou" in rows:
        found |= _score(f"iou{suffix}", located["iou"], located["has_union"])
    return found


def _score(
    name: str, values: pandas.Series, defined: pandas.Series, kept: pandas.Series | None = None
) -> dict[str, float]:
    """Mean of a score over the `kept` rows, by default all, and the number of rows that are not defined.

    A kept row that is not defined counts with its value, which is 0 by convention. The mean is absent if no
    row is defined, or if a value is NaN.
    """
    kept = pandas.Series(True, index=values.index) if kept is None else kept
    defined = kept & defined.astype(bool)
    found: dict[str, float] = {f"{name}_undefined": int((~defined).sum())}
    return found | (measured({name: _mean(values[kept])}) if defined.any() else {})


def _mean(values: pandas.Series) -> float:
    return float(values.astype("float64").mean(skipna=False))
