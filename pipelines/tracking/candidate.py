"""Decides which version of a registered model gets the alias that machines assign (`candidate`).

A person's decision always wins. Machines mark the versions that they gave the alias with the tag
`alias.<alias>`, which tells their assignments from those of a person.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.tracking.provenance import DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# Tag: a person approved or rejected the version. Machines give it no alias after that.
DECISION = "decision"
GATES = "gates"  # tag: outcome of the version's gates (pass, fail, undecided); absent if none are defined
GATES_FILE = "gates.json"  # artifact of a version's run: the outcome of each gate
DATA = "dataset.digest"  # tag: the data that the version's metrics were measured on
# Values of the tag `alias.<alias>`: the version is about to get the alias, has got it, or has lost it to
# another version.
OFFERED, GIVEN, PASSED = "offered", "given", "passed on"


def nominate(
    client: MlflowClient, version: ModelVersion, alias: str, metric: str | None, higher_is_better: bool
) -> str:
    """Gives `version` the alias unless its present holder is better or a person decided otherwise.

    If a person removes the alias from a version or gives it to another one, machines leave it there.

    Args:
        client: client of the registry.
        version: the version to nominate, with the tag `metric.<metric>`.
        alias: name of the alias.
        metric: metric that decides between two versions. If `None`, the alias is only given if no version has
            it.
        higher_is_better: whether a higher value of the metric is better.

    Returns:
        The outcome, as a phrase that follows the version's name: `alias candidate`, or `without alias
        candidate, ...`.
    """
    name, number, mark = version.name, str(version.version), f"alias.{alias}"
    holder = _holder(client, name, alias)
    if holder is None or str(holder.version) != number:
        if reason := _against(version, _same(client, version), holder, mark, metric, higher_is_better):
            return f"without alias {alias}, {reason}"
        # Set first: if this call is killed before the alias is given, it can be repeated.
        client.set_model_version_tag(name, number, mark, OFFERED)
        if holder is not None:
            client.set_model_version_tag(name, str(holder.version), mark, PASSED)
        client.set_registered_model_alias(name, alias, number)
        client.set_model_version_tag(name, number, mark, GIVEN)
    elif version.tags.get(mark) == OFFERED:
        client.set_model_version_tag(name, number, mark, GIVEN)
    return f"alias {alias}"


def _holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def _same(client: MlflowClient, version: ModelVersion) -> list[ModelVersion]:
    """Returns `version` and all other versions of the same model.

    There are others if the files of a version were lost, because the model is then registered again.
    """
    digest = version.tags.get(DIGEST)
    found = client.search_model_versions(f"tags.`{DIGEST}` = '{digest}'") if digest else []
    return [
        version,
        *(item for item in found if item.name == version.name and item.version != version.version),
    ]


def _against(
    version: ModelVersion,
    same: Sequence[ModelVersion],
    holder: ModelVersion | None,
    mark: str,
    metric: str | None,
    higher_is_better: bool,
) -> str:
    """Returns why `version` may not get the alias that `holder` has; empty if it may.

    `same` are the versions with the model of `version`, and `mark` is the tag `alias.<alias>`.
    """
    if decision := next((item.tags[DECISION] for item in same if DECISION in item.tags), None):
        return f"for a person decided on it ({decision})"
    if (gates := version.tags.get(GATES, "pass")) != "pass":
        return f"for its gates are not passed ({gates})"
    if holder is not None and str(holder.version) in [str(item.version) for item in same]:
        return ""
    if any(item.tags.get(mark) == GIVEN for item in same):
        return "which a person took away from it"
    if holder is None:
        return ""
    has = f"which version {holder.version} has"
    if holder.tags.get(mark) not in (OFFERED, GIVEN) and version.tags.get(mark) != OFFERED:
        return f"{has} by a person's hand"
    if metric is None:
        return f"{has}: no metric decides"
    if version.tags.get(DATA) != holder.tags.get(DATA):
        return f"{has}: the two were measured on different data"
    own, best = (_value(item, metric) for item in (version, holder))
    if own is None or best is None:
        return f"{has}: {metric} was not measured on {'this one' if own is None else 'that one'}"
    worse = own < best if higher_is_better else own > best
    return f"{has}: {metric} is {own:.4g} here, {best:.4g} there" if worse else ""


def _value(version: ModelVersion, metric: str) -> float | None:
    """Returns the metric of a version, `None` if it was not measured."""
    value = float(version.tags.get(f"metric.{metric}", "nan"))
    return value if math.isfinite(value) else None
