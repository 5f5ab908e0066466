"""Which version of a registered model has the alias that machines give (`candidate`). A person is never overruled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.tracking.provenance import DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DECISION = (
    "decision"  # tag: a person approved or rejected the version; machines give it no alias from then on
)
DATA = "dataset.digest"  # tag: the data that the version's metrics were measured on
OFFERED, GIVEN, PASSED = (
    "offered",
    "given",
    "passed on",
)  # values of the tag `alias.<alias>`, which a machine alone sets


def nominate(
    client: MlflowClient, version: ModelVersion, alias: str, metric: str | None, higher_is_better: bool
) -> str:
    """Gives `version` the alias unless the version that has it is better, or a person decided otherwise.

    If a person takes the alias away from a version or gives it to another one, it stays so.

    Args:
        client: of the registry.
        version: with the tag `metric.<metric>`.
        alias: its name.
        metric: which decides; None: the alias is only given if no version has it.
        higher_is_better: whether a higher value of the metric is better.

    Returns:
        What became of the alias, in words that follow the version's name.
    """
    name, number, mark = version.name, str(version.version), f"alias.{alias}"
    holder = _holder(client, name, alias)
    if holder is None or str(holder.version) != number:
        if reason := _against(version, _same(client, version), holder, mark, metric, higher_is_better):
            return f"without alias {alias}, {reason}"
        client.set_model_version_tag(
            name, number, mark, OFFERED
        )  # a call that ends before the alias is given can be repeated
        if holder is not None:
            client.set_model_version_tag(name, str(holder.version), mark, PASSED)
        client.set_registered_model_alias(name, alias, number)
        client.set_model_version_tag(name, number, mark, GIVEN)
    elif version.tags.get(mark) == OFFERED:
        client.set_model_version_tag(name, number, mark, GIVEN)
    return f"alias {alias}"


def _holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has the alias."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def _same(client: MlflowClient, version: ModelVersion) -> list[ModelVersion]:
    """`version`, and the other versions with the same model: it is registered again if their files were lost."""
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
    """Why `version`, or one with the `same` model, may not have the alias of `holder`; empty if it may."""
    if decision := next((item.tags[DECISION] for item in same if DECISION in item.tags), None):
        return f"for a person decided on it ({decision})"
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
    """The metric of a version, None if it was not measured."""
    value = float(version.tags.get(f"metric.{metric}", "nan"))
    return value if math.isfinite(value) else None
