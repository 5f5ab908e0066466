"""Proposes values of trials to Ray Tune by Optuna, which learns from the records of earlier trials."""

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

_BY_TPE, _AT_RANDOM = 20, 200  # attempts to find values that no trial has had, first by TPE, then at random


class Suggestions(Searcher):
    """Proposes the values in `first`, then values of Optuna, and none twice.

    Args:
        params: space, metrics, number of trials and seed.
        directory: directory of the search.
        first: values of the first trials.
        on_trial: called with the record of each trial that is over.

    Attributes:
        study: Optuna's study, with one objective per metric of the search.
    """

    def __init__(
        self,
        params: SearchParams,
        directory: str,
        first: list[dict[str, Any]],
        on_trial: Callable[[Trial], None],
    ) -> None:
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
        # Ray Tune's id of a trial -> Optuna's trial and its values
        self._asked: dict[str, tuple[optuna.Trial, dict[str, Any]]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | Any:
        """Returns values that no trial has had, or `Searcher.FINISHED` if none are found.

        In a small space TPE proposes the same values again and again. After _BY_TPE attempts they are random.
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
        """Settles the record of a trial that was stopped or lost, and passes the record to Optuna."""
        asked, values = self._asked[trial_id]
        place = trial_directory(self._directory, values)
        trial = read_trial(place)
        if trial["status"] == "running":
            lost = "its process was lost, or could not be started" if error else ""
            trial = settle_trial(place, trial, "failed" if error else "stopped", error=lost)
        tell(self.study, asked, trial, self.metric)  # type: ignore[arg-type]
        self._on_trial(trial)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing, because a search resumes from the records of its trials."""


def mode_of(metric: str) -> str:
    """Returns Ray Tune's mode of a metric, "min" if lower is better, else "max"."""
    return "min" if higher_is_better(metric) is False else "max"


def tpe(trials: int, seed: int) -> optuna.samplers.TPESampler:
    """Returns the TPE sampler of a search of `trials` trials.

    The first third of the trials, but at most 10, are random. Dimensions are drawn jointly; those with the
    same condition (`when`) form a group.
    """
    with warnings.catch_warnings():
        # Optuna has called `multivariate` and `group` experimental since 2.2.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        startup = max(1, min(10, trials // 3))
        return optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, group=True, seed=seed)


def tell(study: optuna.Study, asked: optuna.Trial, trial: Trial, metrics: list[str]) -> None:
    """Reports the record `trial` to `study`, as the outcome of its trial `asked`.

    A finished trial that has measured all `metrics` is reported with their values, a failed one as failed.
    Other trials were stopped by successive halving or could not measure a metric. They are reported as
    pruned, with the first metric after each epoch. With several metrics Optuna does not accept these values,
    so they become a user attribute.
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
    """Returns, by key, the values that Optuna draws from `space` for its `trial`."""

    def one(dimension: SearchDimension) -> Any:
        if dimension.choice is not None:
            return trial.suggest_categorical(dimension.key, dimension.choice)
        least, most = dimension.extremes
        return trial.suggest_float(dimension.key, least, most, log=dimension.loguniform is not None)  # type: ignore[arg-type]

    return draw(space, one)
