"""Trials of a search: what is drawn for them, and the record of each one, which outlives the search's process.

<search>/trials/<hash of the values>/trial.json      the record
<search>/trials/<hash of the values>/checkpoints     of a trial that is not settled yet; see `checkpoints`
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
SETTLED = (
    "finished",
    "stopped",
)  # never run again; a failed trial is tried again when the search is started again


class Trial(TypedDict):
    """One trial."""

    values: dict[str, Any]  # key of the params -> value drawn
    started: float  # seconds since 1970, of its first start: trials are numbered in this order
    status: Literal["running", "finished", "stopped", "failed"]  # stopped: by successive halving
    history: list[EpochRecord]
    metrics: dict[
        str, float
    ]  # what was measured: of a finished one at its best epoch, of a stopped one at its last one
    error: str  # of a failed one


def draw(space: list[SearchDimension], suggest: Callable[[SearchDimension], Any]) -> dict[str, Any]:
    """Key -> value: what `suggest` gives for each dimension whose conditions the values before it fulfil."""
    values: dict[str, Any] = {}
    for dimension in space:
        if all(key in values and values[key] == wanted for key, wanted in dimension.when.items()):
            values[dimension.key] = suggest(dimension)
    return values


def values_of_params(params: Params) -> dict[str, Any] | None:
    """The values that `params` themselves have in their search space; None where they lie outside of it."""

    def find(dimension: SearchDimension) -> Any:
        value = param(params, dimension.key)
        if dimension.choice is not None:
            return dimension.choice[dimension.choice.index(value)]  # 2, where the param is 2.0
        if dimension.extremes != sorted([*dimension.extremes, value])[::2]:
            raise ValueError(f"{dimension.key}: {value} is out of range")
        return value

    try:
        return draw(params.search.space, find)
    except (TypeError, ValueError):  # not a number, or not there
        return None


def trial_directory(directory: str, values: Mapping[str, Any]) -> str:
    """Where the trial with these values lives."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"{directory}/trials/{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def start_trial(place: str, values: dict[str, Any]) -> Trial:
    """The record of the trial at `place`, a new one where there is none; what is not settled is running from now on."""
    trial: Any = _record(place) or {"values": values, "started": time.time()}
    return trial if trial.get("status") in SETTLED else settle_trial(place, trial, "running")


def settle_trial(
    place: str, trial: Trial, status: str, metrics: Mapping[str, float] | None = None, error: str = ""
) -> Trial:
    """Writes the record with this status, and returns it; raises `LeaseError` if another search has taken over."""
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
    """The record at `place`; raises `FileNotFoundError` if there is none."""
    trial = _record(place)
    if trial is None:
        raise FileNotFoundError(f"{place}: no record of a trial")
    return trial


def _record(place: str) -> Trial | None:
    """The record at `place`; None if there is none, or a crash has left it unreadable: then its trial is run again."""
    trial: Any = files.read_record(f"{place}/{RECORD}", dict)
    return trial if trial is not None and Trial.__required_keys__ <= trial.keys() else None


def read_trials(directory: str) -> list[Trial]:
    """The records of a search, in the order in which the trials started: a trial's place in it is its number."""
    found = [_record(f"{directory}/trials/{name}") for name in files.names_in(f"{directory}/trials")]
    return sorted(filter(None, found), key=lambda trial: (trial["started"], json.dumps(trial["values"])))
