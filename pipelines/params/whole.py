"""The whole of `params.yaml`: read, checked, and explained where it is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from pipelines.params.base import ParamsError, Strict
from pipelines.params.clip import ClipGroupParams
from pipelines.params.data import SOURCES, DataParams, Dataset
from pipelines.params.evaluation import EvaluateParams
from pipelines.params.methods import BcosifyParams, DistillParams, GuideParams, PretrainParams
from pipelines.params.search import SearchParams
from pipelines.params.training import ModelParams, StorageParams, TrainingParams
from pipelines.storage.errors import one_line


class TrackingParams(Strict):
    """MLflow: the server is named by MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db."""

    experiment: str
    model_name: str  # in the registry
    alias: str = "candidate"


class Params(Strict):
    """The whole of `params.yaml`."""

    seed: int
    recipe: str
    dataset: str
    datasets: dict[str, Dataset]
    data: DataParams
    model: ModelParams
    storage: StorageParams = StorageParams()
    training: TrainingParams
    pretrain: PretrainParams
    bcosify: BcosifyParams
    distill: DistillParams
    guide: GuideParams
    clip: ClipGroupParams
    evaluate: EvaluateParams
    search: SearchParams
    tracking: TrackingParams

    def for_guide(self) -> Params:
        """These params with the data of `guide` in the place of the run's."""
        return self.model_copy(update={"dataset": self.guide.dataset, "data": self.guide.data})

    def for_clip(self, dataset: str) -> Params:
        """These params with `dataset`, read as `clip.data` says, as the run's."""
        return self.model_copy(update={"dataset": dataset, "data": self.clip.data})

    @model_validator(mode="after")
    def _stored_maps_follow(self) -> Params:
        frozen = [run for run in self.distill.runs if getattr(self.distill, run).explanations == "frozen"]
        if frozen and self.data.rand_augment is not None:
            raise ValueError(
                f"distill.{frozen[0]}.explanations: frozen ones do not follow data.rand_augment: set it to null"
            )
        return self

    @model_validator(mode="after")
    def _dataset_exists(self) -> Params:
        named = {"dataset": self.dataset, "guide.dataset": self.guide.dataset}
        named |= {
            f"clip.{key}": getattr(self.clip, key) for key in ("pairs", "images", "labelled", "located")
        }
        for key, name in named.items():
            if name not in self.datasets:
                raise ValueError(
                    f"{key}: {name!r} is not in datasets (it has {', '.join(sorted(self.datasets))})"
                )
        return self


def load(path: str | Path = "params.yaml") -> Params:
    """The validated params at `path`.

    Raises:
        ParamsError: the file is not YAML, or a key, type or value is wrong; one line for each.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ParamsError(f"{path}: not read: {one_line(error)}") from None
    return validate(content, source=str(path))


def validate(content: Any, source: str = "params") -> Params:
    """`content` (nested dicts, as YAML gives them) as `Params`; raises `ParamsError`.

    Each value of the search space alone must be one that its param may have.
    """
    params = _validated(content, source)
    check_space(params, f"{source}: search.space", together=False)
    return params


def check_space(params: Params, source: str = "params: search.space", together: bool = True) -> None:
    """Raises `ParamsError` where a value of the search space is not one that its param may have.

    Args:
        params: whose space it is.
        source: what the error begins with.
        together: whether it must fit the other params as they are, too: that is for the search alone to ask.
    """
    epochs = {f"{params.search.section}.epochs": params.search.epochs}
    for dimension in params.search.space:
        for value in (*dimension.extremes, *dimension.between):
            try:
                replaced(params, {**epochs, **dimension.when, dimension.key: value}, source)
            except ParamsError as error:
                if together or dimension.key in error.keys:
                    raise


def replaced(params: Params, values: Mapping[str, Any], source: str = "params") -> Params:
    """`params` with other `values` by their keys, such as `bcosify.pretrained.lr`.

    Raises:
        ParamsError: a key is not there, or a value is not one that it may have.
    """
    content = params.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        group: Any = content
        for name in path:
            group = group.get(name) if isinstance(group, dict) else None
        if not isinstance(group, dict) or last not in group:
            near = difflib.get_close_matches(last, group or (), n=3)
            told = f"; near it: {', '.join(near)}" if near else ""
            raise ParamsError(f"{source}: {key!r} is not in the params{told}", (key,))
        group[last] = value
    return _validated(content, source)


def param(params: Params, key: str) -> Any:
    """The value of a key such as `bcosify.pretrained.lr`."""
    return reduce(
        lambda group, name: group[name] if isinstance(group, dict) else getattr(group, name),
        key.split("."),
        params,
    )


def leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested `content` by keys such as `bcosify.pretrained.lr`."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= (
            leaves(value, f"{prefix}{name}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{name}": value}
        )
    return found


def _validated(content: Any, source: str) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = {_key(item): _explain(source, item) for item in reversed(error.errors())}  # one a key
        raise ParamsError("\n".join(reversed(lines.values())), tuple(lines)) from None


def _key(item: Any) -> str:
    """The key of one pydantic error, without pydantic's own names of the branches of a union."""
    parts = [str(part) for part in item["loc"] if not re.search(r"\W", str(part)) and part != "int"]
    for place in (
        2,
        4,
    ):  # of the source, and of that of a mixture's part: datasets.NAME.mixture.of.0.scenes.seed
        if (
            parts[:1] == ["datasets"]
            and len(parts) > place
            and parts[place] in SOURCES
            and (place == 2 or parts[2] == "of")
        ):
            parts.pop(place)
    return ".".join(parts) or "the file"


def _explain(source: str, item: Any) -> str:
    """One line for one pydantic error: the key, the value, what is allowed."""
    key = _key(item)
    if item["type"] == "extra_forbidden":
        return f"{source}: {key}: unknown key (value {item['input']!r})"
    if item["type"] == "missing":
        return f"{source}: {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {key}: {message}" + (
        "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    )
