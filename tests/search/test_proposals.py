"""The exchange with Optuna: the values that it proposes, and the reports of trials to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from pipelines.params import AshaParams, SearchDimension, SearchParams
from pipelines.search.proposals import Suggestions, tpe
from pipelines.search.records import settle_trial, trial_directory
from pipelines.storage import files

SPACE = [
    SearchDimension(key="x.bias", choice=["remove", "decay"]),
    SearchDimension(key="x.bias_decay", loguniform=(0.1, 10), when={"x.bias": "decay"}),
    SearchDimension(key="x.lr", loguniform=(0.001, 0.05)),
]


def suggestions(directory: Path, **changes: Any) -> Suggestions:
    params = {
        "stage": "guide",
        "metrics": ["val/accuracy", "val/gridpg"],
        "trials": 6,
        "epochs": 3,
        "space": SPACE,
    }
    params |= {"asha": AshaParams(), "concurrency": 1, "workers": 0, "seed": 0}
    return Suggestions(
        SearchParams.model_construct(**params | changes), str(directory), [], lambda trial: None
    )


def run_trial(
    searcher: Suggestions, name: str, metrics: dict[str, float] | None = None, history: tuple[float, ...] = ()
) -> dict[str, Any]:
    """Runs a trial with the accuracies `history`, finished with `metrics` or stopped; returns its values."""
    values = searcher.suggest(name)
    place = trial_directory(searcher._directory, values)
    rows = [
        {"epoch": n, "step": n, "metrics": {"val/accuracy": value}}
        for n, value in enumerate(history, start=1)
    ]
    files.write_json(f"{place}/history.json", rows)
    if metrics is not None:
        settle_trial(place, files.read_json(f"{place}/trial.json"), "finished", metrics)
    searcher.on_trial_complete(name, {})
    return values


@pytest.mark.parametrize(("trials", "startup"), [(1, 1), (3, 1), (6, 2), (16, 5), (100, 10)])
def test_at_most_a_third_of_the_trials_is_drawn_at_random(trials: int, startup: int) -> None:
    assert tpe(trials, seed=0)._n_startup_trials == startup


def test_with_6_trials_most_are_suggested_by_what_the_others_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher, modelled = suggestions(tmp_path), []
    sample = searcher._tpe._sample
    monkeypatch.setattr(
        searcher._tpe,
        "_sample",
        lambda study, trial, space: (modelled.append(trial.number), sample(study, trial, space))[1],
    )
    for number in range(6):
        run_trial(searcher, str(number), {"val/accuracy": 0.1 * number, "val/gridpg": 0.5})
    assert set(modelled) == {2, 3, 4, 5}


def test_dimensions_are_drawn_together_and_a_conditional_one_in_its_own_group(tmp_path: Path) -> None:
    searcher = suggestions(tmp_path, trials=20)
    for number in range(12):
        run_trial(searcher, str(number), {"val/accuracy": 0.1 * number, "val/gridpg": 0.5})
    searcher._tpe.infer_relative_search_space(searcher.study, searcher.study.ask())  # type: ignore[arg-type]
    groups = searcher._tpe._search_space_group.search_spaces  # type: ignore[union-attr]
    assert sorted(sorted(group) for group in groups) == [["x.bias", "x.lr"], ["x.bias_decay"]]


@pytest.mark.parametrize("metrics", [["val/accuracy"], ["val/accuracy", "val/gridpg"]])
def test_a_stopped_trial_is_told_as_pruned_with_what_it_measured(tmp_path: Path, metrics: list[str]) -> None:
    searcher = suggestions(tmp_path, metrics=metrics)
    run_trial(searcher, "a", {"val/accuracy": 0.6, "val/gridpg": 0.5}, (0.3, 0.6))
    run_trial(searcher, "b", None, (0.2, 0.25))
    finished, stopped = searcher.study.get_trials()
    assert (finished.state, finished.values) == (TrialState.COMPLETE, [0.6, 0.5][: len(metrics)])
    assert stopped.state == TrialState.PRUNED
    told = stopped.user_attrs["val/accuracy"] if len(metrics) > 1 else stopped.intermediate_values
    assert told == {1: 0.2, 2: 0.25}
    for name in "cdef":  # TPE accepts the pruned trial
        run_trial(searcher, name, {"val/accuracy": 0.6, "val/gridpg": 0.5})
    assert len([trial for trial in searcher.study.get_trials() if trial.state == TrialState.COMPLETE]) == 5


def test_a_finished_trial_that_did_not_measure_a_metric_has_no_value(tmp_path: Path) -> None:
    searcher = suggestions(tmp_path)
    run_trial(searcher, "a", {"val/accuracy": 0.9}, (0.9,))
    run_trial(searcher, "b", {"val/accuracy": 0.4, "val/gridpg": 0.0}, (0.4,))
    without, with_zero = searcher.study.get_trials()
    assert without.state == TrialState.PRUNED
    assert with_zero.values == [0.4, 0.0]
    assert [trial.number for trial in searcher.study.best_trials] == [1]


def test_what_should_fall_is_minimised(tmp_path: Path) -> None:
    searcher = suggestions(tmp_path, metrics=["val/accuracy", "val/calibration_error"])
    assert searcher.mode == ["max", "min"]
    for name, error in (("a", 0.3), ("b", 0.1)):
        run_trial(searcher, name, {"val/accuracy": 0.5, "val/calibration_error": error})
    assert [trial.number for trial in searcher.study.best_trials] == [1]


def test_a_small_space_is_searched_to_its_end_and_no_point_comes_twice(tmp_path: Path) -> None:
    seeds = SearchDimension(key="seed", choice=[0, 1, 2, 3])
    searcher = suggestions(tmp_path, space=[seeds], metrics=["val/accuracy"], trials=4)
    had = [run_trial(searcher, str(number), {"val/accuracy": 0.1 * number})["seed"] for number in range(4)]
    assert sorted(had) == [0, 1, 2, 3]
    assert searcher.suggest("fifth") == Suggestions.FINISHED
