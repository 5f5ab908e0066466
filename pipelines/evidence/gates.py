"""Gates: whether the evidence on a model suffices for a condition that was set before.

A gate passes if the whole confidence interval of its figure fulfils the condition, and fails if no part of it
does. Otherwise the images are too few to tell, and the gate is undecided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas

from pipelines.directions import higher_is_better
from pipelines.evidence.intervals import OF_MODELS, Interval, difference, interval, parts
from pipelines.evidence.records import Records
from pipelines.params import GateParams

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True)
class Judged:
    """The outcome of a gate.

    Attributes:
        gate: the gate.
        outcome: `pass`, `fail` or `undecided`.
        value: the figure of the model; `None` if it was not measured.
        compared: what the condition is about, with its interval. That is the figure itself, its difference
            from the parent's figure, or for a relative change r its difference from 1 + r times the parent's
            figure, which must be at least 0.
    """

    gate: GateParams
    outcome: str
    value: float | None
    compared: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, of which those that were not measured are absent."""
        whole = {"split": self.gate.split, "greater_is_better": _rises(self.gate)}
        found: dict[str, Any] = {**self.gate.model_dump(), **whole, "outcome": self.outcome}
        if self.value is not None:
            found["value"] = self.value
        if self.compared is not None:
            found |= {
                "compared": self.compared.value,
                "interval": [self.compared.low, self.compared.high],
            }
        return found


def judge(gate: GateParams, records: Mapping[str, Records], model: str, parent: str) -> Judged:
    """The outcome of a gate for a model.

    Args:
        gate: the gate.
        records: split -> records of an evaluation that has both models.
        model: name of the model in the records.
        parent: name of the model that it was made from.
    """
    own, other = (_parts(records[gate.split], name, gate.metric) for name in (model, parent))
    figure, sign = interval(own), 1 if _rises(gate) else -1
    if gate.threshold is not None:
        compared, bound = figure, sign * gate.threshold
    elif gate.min_absolute_change is not None:
        compared, bound = difference(own, other), gate.min_absolute_change
    else:
        change = sign * (gate.min_relative_change or 0)
        compared, bound = difference(own, other.assign(top=other["top"] * (1 + change))), 0.0
    outcome = UNDECIDED
    if compared is not None:
        low, high = sorted((sign * compared.low, sign * compared.high))
        outcome = PASS if low >= bound else FAIL if high < bound else UNDECIDED  # undecided if NaN, too
    return Judged(gate, outcome, None if figure is None else figure.value, compared)


def overall(outcomes: Iterable[str]) -> str:
    """`fail` if a gate failed, else `undecided` if one is undecided, else `pass`."""
    found = set(outcomes)
    return next((outcome for outcome in (FAIL, UNDECIDED) if outcome in found), PASS)


def own_explanation(names: Sequence[str]) -> str:
    """The explanation that speaks for a model: `bcos` if it has that, else `gradcam`, else its first."""
    return next((name for name in ("bcos", "gradcam") if name in names), next(iter(names), "bcos"))


def _parts(records: Records, model: str, metric: str) -> pandas.DataFrame:
    """The parts of a figure; scores of explanations are those of the model's own."""
    if metric in OF_MODELS:
        return parts(records, model, metric)
    rows = records.explanations
    names = rows["explanation"][rows["model"] == model].unique()
    return parts(records, model, metric, own_explanation(list(names)))


def _rises(gate: GateParams) -> bool:
    """True if a greater figure is better."""
    if gate.greater_is_better is not None:
        return gate.greater_is_better
    return higher_is_better(gate.metric) is not False
