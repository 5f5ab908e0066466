"""Evidence for a decision: the versions of a model, their figures and gates, differences of two versions."""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.storage import files
from pipelines.tracking.candidate import GATES_FILE
from pipelines.tracking.decisions import State, aliases_of, gates_of, look, pages, versions_of
from pipelines.tracking.server import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Reference:
    """A version as a user names it: `NAME/VERSION`, `NAME@ALIAS`, or either after `models:/`.

    Attributes:
        name: name of the registered model.
        version: number of the version; empty if an alias is given.
        alias: alias; empty if a number is given.
    """

    name: str
    version: str = ""
    alias: str = ""


def parse(text: str) -> Reference:
    """Returns the version that `text` names. Raises `ValueError` if it has neither number nor alias."""
    text = text.removeprefix("models:/")
    name, slash, version = text.rpartition("/")  # names have no slash, but may have an @
    if slash and name and version.isdecimal():
        return Reference(name, version=version)
    name, at, alias = text.rpartition("@")
    if slash or not at or not name or not alias:
        raise ValueError(f"{text!r} is no version: write NAME/VERSION or NAME@ALIAS")
    return Reference(name, alias=alias)


def find_name(client: MlflowClient, name: str) -> str:
    """Returns the name of a registered model; raises `TrackingError` with the nearest if there is none."""
    from mlflow.exceptions import MlflowException

    name = name.removeprefix("models:/")
    try:
        return client.get_registered_model(name).name
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    names = [model.name for model in pages(client.search_registered_models)]
    raise TrackingError(f"there is no registered model {name!r}{_nearest(name, names)}")


def find_version(client: MlflowClient, reference: Reference) -> ModelVersion:
    """Returns a version; raises `TrackingError` with the nearest ones if there is none."""
    name = find_name(client, reference.name)
    if reference.alias:
        aliases = aliases_of(client, name)
        if reference.alias not in aliases:
            near = _nearest(reference.alias, list(aliases))
            raise TrackingError(f"no version of {name} has the alias {reference.alias!r}{near}")
        return client.get_model_version(name, aliases[reference.alias])
    numbers = [int(version.version) for version in versions_of(client, name)]
    wanted = int(reference.version)
    if wanted not in numbers:
        nearest = sorted(sorted(numbers, key=lambda number: abs(number - wanted))[:3])
        told = f"; nearest: {', '.join(map(str, nearest))}" if nearest else ", it has none"
        raise TrackingError(f"{name} has no version {wanted}{told}")
    return client.get_model_version(name, str(wanted))


def _nearest(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, 3, 0.3)
    return f"; nearest: {', '.join(near)}" if near else f"; there are: {', '.join(known[:5]) or 'none'}"


def figures(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    """Returns the measured figures of a version: metrics of its logged model, else its tags `metric.*`."""
    source, found = str(version.source), {}
    if source.startswith("models:/m-"):
        logged = client.get_logged_model(source.removeprefix("models:/"))
        metrics = sorted(logged.metrics or [], key=lambda item: item.timestamp)  # the newest value counts
        found = {metric.key: metric.value for metric in metrics}
    tags = {key: value for key, value in version.tags.items() if key.startswith("metric.")}
    found = found or {key.removeprefix("metric."): float(value) for key, value in tags.items()}
    return {key: found[key] for key in sorted(found) if math.isfinite(found[key])}


def gate_results(client: MlflowClient, version: ModelVersion) -> list[dict[str, Any]]:
    """Returns the gates of a version with outcome, value and interval; empty if its run has no record."""
    from mlflow.exceptions import MlflowException

    try:
        if not any(item.path == GATES_FILE for item in client.list_artifacts(str(version.run_id))):
            return []
        with tempfile.TemporaryDirectory() as folder:
            client.download_artifacts(str(version.run_id), GATES_FILE, folder)
            found: list[dict[str, Any]] | None = files.read_record(Path(folder, GATES_FILE), list)
            return found or []
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []  # the version's run was deleted for good


def overview(client: MlflowClient, name: str | None) -> list[dict[str, Any]]:
    """Returns a row per version: of one registered model, or of all if `name` is `None`."""
    names = [model.name for model in pages(client.search_registered_models)] if name is None else [name]
    return [row for each in names for row in _rows(client, each)]


def _rows(client: MlflowClient, name: str) -> Iterator[dict[str, Any]]:
    state = look(client, name)
    for version in versions_of(client, name):
        yield _summary(version, state) | {"created": version.creation_timestamp}


def _summary(version: ModelVersion, state: State) -> dict[str, Any]:
    number = str(version.version)
    decision = state.on(number)
    return {
        "name": version.name,
        "version": number,
        "aliases": sorted(alias for alias, holder in state.aliases.items() if holder == number),
        "gates": gates_of(version),
        "decision": None if decision is None else ("approved", "rejected")[decision.rejected == number],
        "by": None if decision is None else decision.by,
    }


def evidence(client: MlflowClient, version: ModelVersion) -> dict[str, Any]:
    """Returns what the registry has on a version: summary, gates, figures, tags and decisions."""
    state, number = look(client, version.name), str(version.version)
    decisions = [item for item in state.decisions if number in (item.version, item.rejected)]
    return _summary(version, state) | {
        "run_id": version.run_id,
        "gate_results": gate_results(client, version),
        "figures": figures(client, version),
        "tags": {key: value for key, value in version.tags.items() if not key.startswith("metric.")},
        "decisions": decisions,
    }


def differences(client: MlflowClient, first: ModelVersion, second: ModelVersion) -> dict[str, Any]:
    """Returns in which figures, params and tags two versions differ: key -> [of the first, of the second]."""
    versions = (first, second)
    one, other = (figures(client, version) for version in versions)
    params = [_params(client, version) for version in versions]
    tags = [
        {key: value for key, value in version.tags.items() if not key.startswith(("metric.", "decision"))}
        for version in versions
    ]
    return {
        "versions": [f"{version.name}/{version.version}" for version in versions],
        "figures": {key: [one.get(key), other.get(key)] for key in sorted(one.keys() | other.keys())},
        "params": _differing(*params),
        "tags": _differing(*tags),
    }


def _params(client: MlflowClient, version: ModelVersion) -> Mapping[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        params: Mapping[str, str] = client.get_run(str(version.run_id)).data.params
        return params
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}  # the version's run was deleted for good


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, list[str | None]]:
    return {
        key: [one.get(key), other.get(key)]
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }
