"""A search: drawing of values, resuming after a kill, stopping of weak trials, and the front."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from pipelines.params import (
    AshaParams,
    Params,
    SearchDimension,
    SearchParams,
    TrainingParams,
    replaced,
    validate,
)
from pipelines.search.proposals import define_by_run
from pipelines.search.records import (
    Trial,
    draw,
    read_trials,
    settle_trial,
    start_trial,
    trial_directory,
    values_of_params,
)
from pipelines.search.tune import _halving, front, search
from pipelines.training import TrainingError
from tests.support import toy
from tests.support.driver import run_until_killed

SPACE = [
    SearchDimension(key="x.clip", choice=["agc", "norm"]),
    SearchDimension(key="x.clip_value", choice=[0.1, 0.2, 0.4]),
    SearchDimension(key="x.lr", loguniform=(0.001, 0.05)),
    SearchDimension(key="x.weight_decay", uniform=(0.1, 0.2), when={"x.clip": "norm"}),
]


def toy_search(**changes: Any) -> SearchParams:
    """Returns the params of a search over `toy.toy_trial`."""
    params = {
        "stage": "guide",
        "metrics": ["val/accuracy", "val/gridpg"],
        "trials": 4,
        "epochs": 3,
        "space": SPACE,
    }
    return SearchParams.model_construct(
        **{"asha": None, "concurrency": 1, "workers": 0, "seed": 0, **params, **changes}
    )


def run(directory: Path, kill_at: int = 0, **changes: Any) -> list[Trial]:
    """Runs `toy_search` in `directory`; returns the records."""
    params, told = toy_search(**changes), []
    training = TrainingParams(workers=0, max_failures=0)
    found = search(
        partial(toy.toy_trial, str(directory), kill_at),
        params,
        training,
        str(directory),
        on_trial=told.append,
    )
    assert sorted(trial["started"] for trial in told) == [trial["started"] for trial in found]
    return found


def test_a_condition_is_drawn_where_it_holds_and_ranges_are_kept() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(200):
        trial = study.ask()
        define_by_run(SPACE, trial)
        drawn.append(trial.params)
    assert {values["x.clip"] for values in drawn} == {"agc", "norm"}
    for values in drawn:
        assert ("x.weight_decay" in values) == (values["x.clip"] == "norm")
        assert 0.001 <= values["x.lr"] <= 0.05
    below = sum(values["x.lr"] < (0.001 * 0.05) ** 0.5 for values in drawn)
    assert 70 < below < 130  # half lie below the geometric mean of the bounds


def test_a_condition_on_what_was_not_drawn_does_not_hold() -> None:
    chain = [*SPACE, SearchDimension(key="x.b", choice=[1], when={"x.weight_decay": 0.1})]
    assert list(draw(chain, lambda dimension: dimension.extremes[0])) == ["x.clip", "x.clip_value", "x.lr"]


def test_the_params_themselves_are_a_point_of_their_space_or_not() -> None:
    params = validate(yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text()))
    values = values_of_params(params)
    assert values is not None
    assert replaced(params, values) == params
    outside: Params = replaced(params, {"bcosify.pretrained.optim.lr": 1.0})
    assert values_of_params(outside) is None
    assert values_of_params(replaced(params, {"bcosify.pretrained.b": 3})) is None
    width = [{"key": "distill.student.options.width", "choice": [8, 16]}]
    of_options = params.model_dump(mode="json")
    of_options["search"] |= {"stage": "distill@e2kd", "space": width, "shots": None}
    of_options["distill"]["student"]["options"] = {"width": 16}
    assert values_of_params(validate(of_options)) == {"distill.student.options.width": 16}


def test_the_front_is_of_finished_trials_that_no_other_beats() -> None:
    points = [(0.5, 0.9), (0.7, 0.7), (0.6, 0.6), (0.7, 0.7), (0.9, 0.1), (0.95, 0.0)]
    found: list[Any] = [{"status": "finished", "metrics": {"val/a": a, "val/b": b}} for a, b in points]
    found[-1] = {"status": "stopped", "metrics": {"val/a": 0.95}}
    assert front(found, ["val/a", "val/b"]) == [4, 1, 0]


def test_what_falls_is_better_low_and_what_was_not_measured_is_worse_than_all() -> None:
    metrics = ["val/accuracy", "val/calibration_error"]
    measured: list[dict[str, float]] = [
        {"val/accuracy": 0.7, "val/calibration_error": 0.3},
        {"val/accuracy": 0.7, "val/calibration_error": 0.1},
        {"val/accuracy": 0.6},
        {"val/accuracy": 0.8},
        {"val/accuracy": 0.2, "val/calibration_error": 0.05},
    ]
    found: list[Any] = [{"status": "finished", "metrics": of_trial} for of_trial in measured]
    assert front(found, metrics) == [3, 1, 4]
    assert front(found, metrics[1:]) == [4]


@pytest.mark.parametrize(("metric", "better"), [("val/accuracy", 1.0), ("val/calibration_error", -1.0)])
def test_successive_halving_goes_on_with_the_better_trials(metric: str, better: float) -> None:
    halving = _halving(toy_search(metrics=[metric], asha=AshaParams(grace=1, reduction=2)))
    assert halving._metric_op == better


def test_a_record_has_no_figure_that_was_not_measured(tmp_path: Path) -> None:
    place = trial_directory(str(tmp_path), {"x.lr": 0.1})
    found = {"val/accuracy": 0.5, "val/gridpg": float("nan")}
    assert settle_trial(place, start_trial(place, {"x.lr": 0.1}), "finished", found)["metrics"] == {
        "val/accuracy": 0.5
    }
    assert "NaN" not in Path(place, "trial.json").read_text()


def test_a_search_killed_at_half_keeps_what_is_finished_and_runs_nothing_twice(
    tmp_path: Path, ray_workers: None
) -> None:
    run_until_killed(f"from tests.search.test_tune import run\nrun(Path({str(tmp_path)!r}), kill_at=45)")
    before = read_trials(str(tmp_path))
    # Trials have 18 steps each, so the kill came in the third.
    assert [trial["status"] for trial in before] == ["finished", "finished", "running"]

    after = run(tmp_path)
    assert after[:2] == before[:2]
    assert [trial["status"] for trial in after] == ["finished"] * 4
    assert [after[2][key] for key in ("values", "started")] == [
        before[2][key] for key in ("values", "started")
    ]
    assert len({str(trial["values"]) for trial in after}) == 4
    steps = Counter((tmp_path / "steps").read_text().splitlines())
    names = [Path(trial_directory("", trial["values"])).name for trial in after]
    assert set(steps) == {f"{name} {step}" for name in names for step in range(18)}
    # At most the step that the kill interrupted is done twice.
    assert [step for step, times in steps.items() if times > 1] in ([], [f"{names[2]} 8"])
    assert not list(tmp_path.glob("trials/*/checkpoints"))

    assert run(tmp_path) == after
    assert Counter((tmp_path / "steps").read_text().splitlines()) == steps
    more = run(tmp_path, trials=5)
    assert more[:4] == after


def test_with_enough_trials_those_that_a_kill_left_half_done_do_not_count(tmp_path: Path) -> None:
    for number, status in enumerate(("finished", "running", "stopped")):
        values = {"x.lr": 0.1 * number}
        place = trial_directory(str(tmp_path), values)
        settle_trial(place, start_trial(place, values), status, {"val/accuracy": 0.5})
    assert [trial["status"] for trial in run(tmp_path, trials=2)] == ["finished", "stopped"]


def test_weak_trials_are_stopped_and_bad_ones_do_not_end_the_search(
    tmp_path: Path, ray_workers: None
) -> None:
    space = [SPACE[0], SPACE[1], SearchDimension(key="x.lr", choice=[1e-9, 0.02, 0.03, 0.2])]
    found = run(tmp_path, space=space, trials=8, asha=AshaParams(grace=1, reduction=2), seed=1)
    assert {trial["error"] for trial in found if trial["status"] == "failed"} == {"too fast"}
    assert all(trial["values"]["x.lr"] > 0.1 for trial in found if trial["status"] == "failed")
    stopped = [trial for trial in found if trial["status"] == "stopped"]
    assert stopped
    for trial in stopped:
        assert len(trial["history"]) < 3
        assert trial["metrics"]["val/accuracy"] == trial["history"][-1]["metrics"]["val/accuracy"]
    assert all(len(trial["history"]) == 3 for trial in found if trial["status"] == "finished")


def test_where_nothing_finishes_the_search_ends_with_the_cause(tmp_path: Path, ray_workers: None) -> None:
    space = [SPACE[0], SPACE[1], SearchDimension(key="x.lr", choice=[0.2])]
    with pytest.raises(TrainingError, match=r"^no trial of the search was finished; too fast$"):
        run(tmp_path, space=space, trials=9)
    assert len(read_trials(str(tmp_path))) == 6  # the space has 6 points
