"""Gates: the interval of a figure, or of its difference from the parent's, decides."""

import json
from typing import get_args

import numpy as np
import pandas
import pytest
from pydantic import ValidationError

from pipelines.evidence import Records
from pipelines.evidence.gates import judge, overall, own_explanation
from pipelines.evidence.intervals import OF_EXPLANATIONS, OF_MODELS
from pipelines.params import GateParams


def evaluated(own, parent, count=400):
    """Records of two models with these shares of right predictions and these EPGs."""
    keys = [f"k{number:03d}" for number in range(count)]
    images, rows = [], []
    for model, (share, epg), explanation in (("own", own, "bcos"), ("parent", parent, "gradcam")):
        right = np.arange(count) < share * count
        images.append(pandas.DataFrame({"model": model, "key": keys, "right": right}))
        noise = np.random.default_rng(0).normal(0, 0.1, count)
        columns = {"key": keys, "epg": epg + noise, "box_share": 0.3, "logit": 2.0, "logit_bias": 0.0}
        table = pandas.DataFrame({"model": model, "explanation": explanation, **columns})
        rows.append(table.assign(contributions=1.99))
    facts = {"tasks": {"own": "multiclass", "parent": "multiclass"}}
    return {"val": Records(pandas.concat(images), pandas.concat(rows), pandas.DataFrame(), facts)}


RECORDS = evaluated((0.9, 0.7), (0.88, 0.5))


def outcome(records=RECORDS, **gate):
    return judge(GateParams(name="gate", **gate), records, "own", "parent").outcome


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({"metric": "accuracy", "threshold": 0.85}, "pass"),
        ({"metric": "accuracy", "threshold": 0.95}, "fail"),
        ({"metric": "accuracy", "threshold": 0.9}, "undecided"),
        ({"metric": "accuracy", "min_absolute_change": -0.01, "against": "parent"}, "pass"),
        ({"metric": "accuracy", "min_absolute_change": 0.1, "against": "parent"}, "fail"),
        ({"metric": "epg", "min_absolute_change": 0.15, "against": "parent"}, "pass"),
        ({"metric": "epg", "min_relative_change": 0.3, "against": "parent"}, "pass"),
        ({"metric": "epg", "min_relative_change": 0.5, "against": "parent"}, "fail"),
        ({"metric": "epg", "min_relative_change": 0.4, "against": "parent"}, "undecided"),
        ({"metric": "epg", "threshold": 0.8, "greater_is_better": False}, "pass"),
        ({"metric": "unexplained_share", "threshold": 0.01}, "pass"),
        ({"metric": "unexplained_share", "threshold": 0.001}, "fail"),
        ({"metric": "unexplained_share", "min_absolute_change": 0.001, "against": "parent"}, "fail"),
    ],
)
def test_the_interval_decides(gate, expected):
    assert outcome(**gate) == expected


@pytest.mark.parametrize("metric", ["gridpg", "on_object_epg"])
def test_what_was_not_measured_is_undecided(metric):
    judged = judge(GateParams(name="gate", metric=metric, threshold=0.5), RECORDS, "own", "parent")
    assert judged.outcome == "undecided"
    assert not {"value", "compared", "interval"} & set(judged.to_json())


def test_a_figure_that_is_no_number_is_undecided():
    records = evaluated((0.9, 0.7), (0.88, 0.5))
    records["val"].explanations["logit"] = np.nan
    assert outcome(records, metric="unexplained_share", threshold=0.01) == "undecided"


def test_the_outcome_is_told_with_its_interval():
    gate = GateParams(name="as accurate", metric="accuracy", min_absolute_change=-0.03, against="parent")
    found = json.loads(json.dumps(judge(gate, RECORDS, "own", "parent").to_json()))
    assert found["value"] == pytest.approx(0.9)
    assert found["compared"] == pytest.approx(0.02)
    low, high = found["interval"]
    assert low < 0.02 < high
    assert (found["name"], found["split"], found["outcome"]) == ("as accurate", "val", "pass")


def test_one_gate_that_fails_fails_all():
    assert overall(["pass", "pass"]) == "pass"
    assert overall(["pass", "undecided"]) == "undecided"
    assert overall(["undecided", "fail"]) == "fail"


def test_a_model_speaks_for_itself():
    assert own_explanation(["bcos", "guided"]) == "bcos"
    assert own_explanation(["gradcam", "input_x_gradient"]) == "gradcam"
    assert own_explanation(["input_x_gradient"]) == "input_x_gradient"


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"threshold": 0.5, "min_absolute_change": 0.1}, "exactly one of threshold"),
        ({}, "exactly one of threshold"),
        ({"min_absolute_change": 0.1}, "a change needs `against: parent`"),
        ({"threshold": 0.5, "against": "parent"}, "a threshold has no `against`"),
        ({"threshold": 0.5, "metric": "acuracy"}, "accuracy"),
    ],
)
def test_conditions_that_say_nothing_are_refused(gate, message):
    with pytest.raises(ValidationError, match=message):
        GateParams(**{"name": "gate", "metric": "accuracy", **gate})


def test_every_figure_of_a_gate_has_an_interval():
    assert set(get_args(GateParams.model_fields["metric"].annotation)) <= {*OF_MODELS, *OF_EXPLANATIONS}
