"""Optuna's suggestions as Ray Tune asks for them, told of what the records of the trials say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipelines.params import SearchDimension, SearchParams
from pipelines.search.records import SETTLED, Trial, draw, read_trial, settle_trial, start_trial, trial_directory

_ATTEMPTS = 100  # at values that no trial has had


class Suggestions(OptunaSearch):
    """Values for trials: those in `first` to begin with, then Optuna's, none twice."""

    def __init__(
        self, params: SearchParams, directory: str, first: list[dict[str, Any]], on_trial: Callable[[Trial], None]
    ) -> None:
        """`on_trial` gets the record of each trial that is over."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(
            space=lambda trial: define_by_run(params.space, trial),
            metric=params.metrics,
            mode=["max"] * len(params.metrics),
            sampler=optuna.samplers.TPESampler(seed=params.seed + len(first)),
            points_to_evaluate=first,
        )
        self._directory, self._on_trial = directory, on_trial
        self._asked: dict[str, tuple[str, dict[str, Any]]] = {}  # Tune's id of a trial -> the one told to Optuna, its values

    def suggest(self, trial_id: str) -> dict[str, Any] | Any:
        """Values that no trial has had; `Searcher.FINISHED` where none are found."""
        for attempt in range(_ATTEMPTS):
            name = f"{trial_id}-{attempt}"
            values = super().suggest(name)
            if values is not None and all(values != had for _, had in self._asked.values()):
                self._asked[trial_id] = name, values
                start_trial(trial_directory(self._directory, values), values)
                return values
            super().on_trial_complete(name, error=True)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Settles the record of a trial that was stopped or lost, and tells Optuna; what was not measured of it counts as 0."""
        name, values = self._asked[trial_id]
        place = trial_directory(self._directory, values)
        trial = read_trial(place)
        if trial["status"] == "running":
            lost = "its process was lost, or could not be started" if error else ""
            trial = settle_trial(place, trial, "failed" if error else "stopped", error=lost)
        known = {metric: trial["metrics"].get(metric, 0.0) for metric in self.metric}
        super().on_trial_complete(name, known if trial["status"] in SETTLED else None, error=trial["status"] == "failed")
        self._on_trial(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records say it all."""


def define_by_run(space: list[SearchDimension], trial: Any) -> None:
    """Draws from `space` for Optuna's `trial`."""

    def one(dimension: SearchDimension) -> Any:
        if dimension.choice is not None:
            return trial.suggest_categorical(dimension.key, dimension.choice)
        least, most = dimension.extremes
        return trial.suggest_float(dimension.key, least, most, log=dimension.loguniform is not None)

    draw(space, one)
