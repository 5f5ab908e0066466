"""The trials of a search: how their values are drawn, and their records, which outlive the process.

<search>/trials/<hash of the values>/trial.json      the record
<search>/trials/<hash of the values>/checkpoints     deleted once the trial is settled, see `checkpoints`
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from pipelines.metrics import measured
from pipelines.params import Params, SearchDimension, param
from pipelines.storage import files
from pipelines.storage.lease import check_held
from pipelines.training.job import EpochRecord

RECORD = "trial.json"
# Trials with this status are never run again. A search that is started again retries failed trials.
SETTLED = ("finished", "stopped")


class Trial(TypedDict):
    """The record of a trial."""

    values: dict[str, Any]  # key of the params -> value drawn
    started: float  # when it was first started, in seconds since 1970; trials are numbered in this order
    status: Literal["running", "finished", "stopped", "failed"]  # stopped by successive halving
    history: list[EpochRecord]
    metrics: dict[str, float]  # measured at the best epoch if the trial is finished, else at its last epoch
    error: str  # message of the error of a failed trial, else empty


def draw(space: list[SearchDimension], suggest: Callable[[SearchDimension], Any]) -> dict[str, Any]:
    """Returns, by key, the value of `suggest` for each dimension whose conditions earlier values meet."""
    values: dict[str, Any] = {}
    for dimension in space:
        if all(key in values and values[key] == wanted for key, wanted in dimension.when.items()):
            values[dimension.key] = suggest(dimension)
    return values


def values_of_params(params: Params) -> dict[str, Any] | None:
    """Returns the values that `params` have in their own search space, or `None` if they lie outside."""

    def find(dimension: SearchDimension) -> Any:
        value = param(params, dimension.key)
        if dimension.choice is not None:
            # The value as the space writes it: 2 if the param is 2.0.
            return dimension.choice[dimension.choice.index(value)]
        if dimension.extremes != sorted([*dimension.extremes, value])[::2]:
            raise ValueError(f"{dimension.key}: {value} is out of range")
        return value

    try:
        return draw(params.search.space, find)
    except (TypeError, ValueError):  # the value is outside of the space, or not a number
        return None


def trial_directory(directory: str, values: Mapping[str, Any]) -> str:
    """Returns the directory, in that of the search, of the trial with these values."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"{directory}/trials/{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def start_trial(place: str, values: dict[str, Any]) -> Trial:
    """Returns the record of the trial at `place`, or of a new trial; it is now running unless settled."""
    trial: Any = _record(place) or {"values": values, "started": time.time()}
    return trial if trial.get("status") in SETTLED else settle_trial(place, trial, "running")


def settle_trial(
    place: str, trial: Trial, status: str, metrics: Mapping[str, float] | None = None, error: str = ""
) -> Trial:
    """Writes the record with this status and returns it.

    If `metrics` is `None`, the validation metrics of the trial's last epoch are recorded.

    Raises:
        LeaseError: another search has taken over.
    """
    check_held(place)
    history: list[EpochRecord] = files.read_record(f"{place}/history.json", list) or []
    if metrics is None:
        metrics = (
            {name: value for name, value in history[-1]["metrics"].items() if name.startswith("val/")}
            if history
            else {}
        )
    known = {"status": status, "history": history, "metrics": measured(metrics), "error": error}
    told = Trial(**{**trial, **known})  # type: ignore[typeddict-item]
    files.write_json(f"{place}/{RECORD}", told)
    return told


def read_trial(place: str) -> Trial:
    """Returns the record at `place`; raises `FileNotFoundError` if there is none."""
    trial = _record(place)
    if trial is None:
        raise FileNotFoundError(f"{place}: no record of a trial")
    return trial


def _record(place: str) -> Trial | None:
    """Returns the record at `place`, or `None` if it is missing or unreadable after a crash.

    The trial is then run again.
    """
    trial: Any = files.read_record(f"{place}/{RECORD}", dict)
    return trial if trial is not None and Trial.__required_keys__ <= trial.keys() else None


def read_trials(directory: str) -> list[Trial]:
    """Returns the records of a search in the order of their start. The index of a trial is its number."""
    found = [_record(f"{directory}/trials/{name}") for name in files.names_in(f"{directory}/trials")]
    return sorted(filter(None, found), key=lambda trial: (trial["started"], json.dumps(trial["values"])))
