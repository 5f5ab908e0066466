"""Optuna's suggestions as Ray Tune asks for them, told of what the records of the trials say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipelines.metrics import higher_is_better
from pipelines.params import SearchDimension, SearchParams
from pipelines.search.records import (
    SETTLED,
    Trial,
    draw,
    read_trial,
    settle_trial,
    start_trial,
    trial_directory,
)

_BY_TPE, _AT_RANDOM = 20, 200  # attempts at values that no trial has had, one kind after the other


class Suggestions(Searcher):
    """Values for trials: those in `first` to begin with, then Optuna's, none twice.

    Attributes:
        study: of Optuna, with one objective for each metric of the search.
    """

    def __init__(
        self,
        params: SearchParams,
        directory: str,
        first: list[dict[str, Any]],
        on_trial: Callable[[Trial], None],
    ) -> None:
        """`on_trial` gets the record of each trial that is over."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        modes = [mode_of(metric) for metric in params.metrics]
        super().__init__(metric=params.metrics, mode=modes)  # type: ignore[arg-type]
        seed = params.seed + len(first)
        self._tpe, self._random = tpe(params.trials, seed), optuna.samplers.RandomSampler(seed=seed + 1)
        directions = [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in modes]
        self.study = optuna.create_study(directions=directions, sampler=self._tpe)
        for values in first:
            self.study.enqueue_trial(values)
        self._space, self._directory, self._on_trial = params.space, directory, on_trial
        self._asked: dict[
            str, tuple[optuna.Trial, dict[str, Any]]
        ] = {}  # Tune's id of a trial -> Optuna's trial, its values

    def suggest(self, trial_id: str) -> dict[str, Any] | Any:
        """Values that no trial has had; `Searcher.FINISHED` if none are found.

        In a small space TPE asks for its favourite again and again: then values are drawn at random.
        """
        for attempt in range(_BY_TPE + _AT_RANDOM):
            self.study.sampler = self._tpe if attempt < _BY_TPE else self._random
            trial = self.study.ask()
            values = define_by_run(self._space, trial)
            if all(values != had for _, had in self._asked.values()):
                self._asked[trial_id] = trial, values
                start_trial(trial_directory(self._directory, values), values)
                return values
            self.study.tell(trial, state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Settles the record of a trial that was stopped or lost, and tells Optuna."""
        asked, values = self._asked[trial_id]
        place = trial_directory(self._directory, values)
        trial = read_trial(place)
        if trial["status"] == "running":
            lost = "its process was lost, or could not be started" if error else ""
            trial = settle_trial(place, trial, "failed" if error else "stopped", error=lost)
        tell(self.study, asked, trial, self.metric)  # type: ignore[arg-type]
        self._on_trial(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records say it all."""


def mode_of(metric: str) -> str:
    """`min` for a metric that gets better as it falls, `max` for others: the words of Ray Tune."""
    return "min" if higher_is_better(metric) is False else "max"


def tpe(trials: int, seed: int) -> optuna.samplers.TPESampler:
    """The sampler of a search of `trials` trials: at most a third of them, and at most 10, are random.

    Dimensions are drawn together, those under a condition (`when`) in a group of their own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # `multivariate` and `group` are, since 2.2
        startup = max(1, min(10, trials // 3))
        return optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, group=True, seed=seed)


def tell(study: optuna.Study, asked: optuna.Trial, trial: Trial, metrics: list[str]) -> None:
    """Tells `study` what is on record of the trial that it was asked for.

    Only a finished trial that measured all `metrics` has values. A failed one is told as failed. All others, which successive
    halving has stopped or which could not measure a metric, are told as pruned with the first metric's value after each epoch.
    Where there are several metrics Optuna takes no such values, and they are an attribute of its trial.
    """
    values = [trial["metrics"].get(name) for name in metrics]
    if trial["status"] not in SETTLED:
        study.tell(asked, state=TrialState.FAIL)
    elif trial["status"] == "finished" and None not in values:
        study.tell(asked, values)  # type: ignore[arg-type]
    else:
        found = {
            row["epoch"]: row["metrics"][metrics[0]]
            for row in trial["history"]
            if metrics[0] in row["metrics"]
        }
        if len(metrics) > 1:
            asked.set_user_attr(metrics[0], found)
        else:
            for epoch, value in found.items():
                asked.report(value, epoch)
        study.tell(asked, state=TrialState.PRUNED)


def define_by_run(space: list[SearchDimension], trial: optuna.Trial) -> dict[str, Any]:
    """Key -> value, drawn from `space` for Optuna's `trial`."""

    def one(dimension: SearchDimension) -> Any:
        if dimension.choice is not None:
            return trial.suggest_categorical(dimension.key, dimension.choice)
        least, most = dimension.extremes
        return trial.suggest_float(dimension.key, least, most, log=dimension.loguniform is not None)  # type: ignore[arg-type]

    return draw(space, one)
