"""Confidence intervals of the figures of an evaluation, by the bootstrap over its images.

A figure is a ratio of sums over images, Σ top / Σ bottom. For an accuracy, `top` tells whether an image is
classified correctly, and `bottom` is 1; for a mean over the classes in each image, `bottom` is their number.
The images are drawn with replacement; percentiles of the figure over many draws bound its interval.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas
from scipy import stats

from pipelines.evidence.records import Records

DRAWS = 2000
LEVEL = 0.95
OF_MODELS = ("accuracy", "f1", "agreement", "explanation_similarity")
OF_EXPLANATIONS = ("gridpg", "gridpg_own_grids", "epg", "on_object_epg", "iou", "unexplained_share")
_COLUMNS = ["explanation_similarity", "epg", "iou", "on_object_epg", "box_share", "object_share"]
_COLUMNS += ["contributions", "logit_bias"]


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def interval(parts: pandas.DataFrame, seed: int = 0) -> Interval | None:
    """The interval of one figure from its `parts`; `None` if it was not measured on two images."""
    return _bootstrap([parts["top"], parts["bottom"]], _ratio, seed)


def difference(one: pandas.DataFrame, other: pandas.DataFrame, seed: int = 0) -> Interval | None:
    """The interval of the figure of `one` minus that of `other`, on the images that both have.

    It is paired: each draw takes the same images for both. `None` if they share fewer than two images.
    """
    both = one.join(other, how="inner", lsuffix="_one", rsuffix="_other")
    columns = [both[name] for name in ("top_one", "bottom_one", "top_other", "bottom_other")]
    return _bootstrap(columns, _gap, seed)


def intervals(records: Records, seed: int = 0) -> dict[str, Any]:
    """The intervals of the headline figures, nested as in `figures`, with `value`, `low` and `high`."""
    found: dict[str, Any] = {}
    for model in records.models:
        single = records.facts["tasks"][model] == "multiclass"
        absent = set() if single else {"accuracy"}
        absent |= {"f1"} if single and not records.facts["decisions"] else set()
        absent |= {"agreement"} if model == records.facts["teacher"] else set()
        names = [name for name in OF_MODELS if name not in absent]
        of_model = {name: interval(parts(records, model, name), seed) for name in names}
        rows = records.explanations
        explanations = {
            str(explanation): {
                name: interval(parts(records, model, name, str(explanation)), seed)
                for name in OF_EXPLANATIONS
            }
            for explanation in rows["explanation"][rows["model"] == model].unique()
        }
        found[model] = {
            **_measured(of_model),
            "explanations": {name: _measured(scores) for name, scores in explanations.items()},
        }
    return found


def _measured(found: Mapping[str, Interval | None]) -> dict[str, dict[str, float]]:
    return {name: asdict(each) for name, each in found.items() if each is not None}


def parts(records: Records, model: str, figure: str, explanation: str | None = None) -> pandas.DataFrame:
    """The columns `top` and `bottom` of a figure, a row per image that it is measured on.

    The rows of grid pointing games are grids. The table is empty if the figure was not measured.

    Args:
        records: records of an evaluation.
        model: name of the model.
        figure: one of `OF_MODELS`, or with an explanation one of `OF_EXPLANATIONS`.
        explanation: name of the explanation.
    """
    games = figure.startswith("gridpg")
    table = records.predictions if explanation is None else records.grids if games else records.explanations
    rows = table[table["model"] == model] if len(table) else table
    if explanation is not None and len(rows):
        rows = rows[rows["explanation"] == explanation]
    if rows.empty:
        return pandas.DataFrame({"top": [], "bottom": []})
    rows = rows.reindex(columns=rows.columns.union(_COLUMNS))  # those that were not measured are NaN
    found = _parts(records, rows, figure).assign(unit=rows["grid" if games else "key"])
    return found.dropna().groupby("unit").sum()


def _parts(records: Records, rows: pandas.DataFrame, figure: str) -> pandas.DataFrame:
    """`top` and `bottom` for each row of a table; NaN for rows that do not count."""
    one = pandas.Series(1.0, index=rows.index)
    match figure:
        case "accuracy":
            top, bottom = rows["right"], one
        case "f1":
            top, bottom = _decisions(rows)
        case "agreement":
            teacher = records.predictions[records.predictions["model"] == records.facts["teacher"]]
            wanted = rows["key"].map(teacher.set_index("key")["prediction"])
            top, bottom = (rows["prediction"] == wanted).where(wanted.notna()), one
        case "explanation_similarity":
            top, bottom = rows[figure], one
        case "gridpg" | "gridpg_own_grids":
            top, bottom = rows["score"].where(rows["game"] == figure), one
        case "epg" | "iou":
            top, bottom = rows[figure].where(rows["box_share"] > 0), one
        case "on_object_epg":
            top, bottom = rows[figure].where(rows["object_share"] > 0), one
        case "unexplained_share":
            wanted = rows["logit"].astype("float64") - rows["logit_bias"]
            top, bottom = (wanted - rows["contributions"]).abs(), wanted.abs()
        case _:
            raise ValueError(f"figure: one of {', '.join(OF_MODELS + OF_EXPLANATIONS)}, not {figure}")
    return pandas.DataFrame({"top": top.astype("float64"), "bottom": bottom})


def _decisions(rows: pandas.DataFrame) -> tuple[pandas.Series, pandas.Series]:
    """Parts of the micro-averaged F1 per image: 2·TP and 2·TP + FP + FN, over the classes."""
    chosen = [np.flatnonzero(logits >= 0) for logits in rows["logits"]]
    hits = [np.isin(labels, picked).sum() for labels, picked in zip(rows["labels"], chosen, strict=True)]
    both = [len(labels) + len(picked) for labels, picked in zip(rows["labels"], chosen, strict=True)]
    return 2.0 * pandas.Series(hits, index=rows.index), pandas.Series(both, index=rows.index, dtype="float64")


def _bootstrap(
    columns: list[pandas.Series], statistic: Callable[..., np.ndarray], seed: int
) -> Interval | None:
    data = tuple(column.to_numpy(np.float64) for column in columns)
    if len(data[0]) < 2:
        return None
    found = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=DRAWS,
        batch=max(1, 4_000_000 // len(data[0])),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(float(statistic(*data, axis=0)), float(low), float(high))


def _ratio(top: np.ndarray, bottom: np.ndarray, axis: int) -> np.ndarray:
    return top.sum(axis) / bottom.sum(axis)


def _gap(
    one_top: np.ndarray, one_bottom: np.ndarray, other_top: np.ndarray, other_bottom: np.ndarray, axis: int
) -> np.ndarray:
    return _ratio(one_top, one_bottom, axis) - _ratio(other_top, other_bottom, axis)
