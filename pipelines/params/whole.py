"""params.yaml as a whole: reading, validation, and its errors in one line each."""

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
from pipelines.params.gates import GateParams
from pipelines.params.methods import BcosifyParams, DistillParams, GuideParams, PretrainParams
from pipelines.params.renames import check_names, renamed
from pipelines.params.search import SearchParams
from pipelines.params.training import ModelParams, StorageParams, TrainingParams
from pipelines.storage.errors import one_line


class TrackingParams(Strict):
    """Tracking of runs and registration of models in MLflow. The environment variable MLFLOW_TRACKING_URI
    names the server; without it, the stages use sqlite:///mlflow.db."""

    experiment: str
    """MLflow experiment that all runs belong to."""
    model_name: str
    """Name of the registered model."""
    alias: str = "candidate"
    """Alias that the stage `register` gives to a new version if it is not worse than the one that has it."""


class Params(Strict):
    """The whole of params.yaml: single params first, then groups in the order of the graph of stages."""

    recipe: str
    """Name of the recipe that these params were composed from."""
    seed: int
    """Seed of the initial weights, of the order of images, and of augmentation."""
    dataset: str
    """Key in `datasets` of the images for pretrain, bcosify and distill. Set it by `-S dataset=NAME`."""
    datasets: dict[str, Dataset]
    """Data sets of this run, chosen by `-S dataset=NAME` and `-S guide=NAME`."""
    data: DataParams
    """How the images of `dataset` are read from shards."""
    model: ModelParams
    """The network of pretrain and bcosify."""
    pretrain: PretrainParams
    """Training of the conventional model."""
    bcosify: BcosifyParams
    """B-cosification: B-cos networks from the pretrained model, and from scratch as the baseline."""
    distill: DistillParams
    """e²KD: students learn the answers and explanations of a teacher."""
    guide: GuideParams
    """Model guidance: bounding boxes move a classifier's explanations onto the objects."""
    clip: ClipGroupParams
    """B-cosified CLIP: zero-shot models that show which pixels match a text."""
    evaluate: EvaluateParams
    """Evaluation of all models on the test split: accuracy, localisation, pictures."""
    gates: tuple[GateParams, ...] = ()
    """Conditions on the network that is registered; it becomes the candidate only if all are fulfilled."""
    search: SearchParams
    """Search for better params of one stage by short trials."""
    training: TrainingParams
    """The training loop and its workers, the same for all stages that train."""
    storage: StorageParams = StorageParams()
    """Place of checkpoints, and of the files that workers on other machines read."""
    tracking: TrackingParams
    """MLflow; the environment variable MLFLOW_TRACKING_URI names the server."""

    def for_guide(self) -> Params:
        """Returns a copy that trains on the data of `guide`."""
        return self.model_copy(update={"dataset": self.guide.dataset, "data": self.guide.data})

    def for_clip(self, dataset: str) -> Params:
        """Returns a copy that trains on `dataset`, read as `clip.data` says."""
        return self.model_copy(update={"dataset": dataset, "data": self.clip.data})

    @model_validator(mode="after")
    def _stored_maps_follow(self) -> Params:
        frozen = [run for run in self.distill.runs if getattr(self.distill, run).explanations == "frozen"]
        if frozen and self.data.rand_augment is not None:
            raise ValueError(
                f"distill.{frozen[0]}.explanations: frozen ones do not follow data.rand_augment: "
                "set it to null"
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
                    f"{key}: {name!r} is not in datasets (it has {', '.join(sorted(self.datasets))}); "
                    "others come with -S dataset=NAME, -S guide=NAME or -S +source@datasets.NAME=NAME"
                )
        return self


def load(path: str | Path = "params.yaml") -> Params:
    """Returns the validated params of the file `path`.

    Raises:
        ParamsError: the file is not YAML, or keys, types or values are wrong; a line per key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ParamsError(f"{path}: not read: {one_line(error)}") from None
    return validate(content, source=str(path))


def validate(content: Any, source: str = "params") -> Params:
    """Returns `content` (nested dicts, as read from YAML) as `Params`; raises `ParamsError`.

    Each value of the search space must be valid for its param, but need not fit the other params.
    """
    params = _validated(content, source)
    check_space(params, f"{source}: search.space", together=False)
    return params


def check_space(params: Params, source: str = "params: search.space", together: bool = True) -> None:
    """Raises `ParamsError` if a value of the search space is not valid for its param.

    Args:
        params: the params with the space.
        source: start of the error line.
        together: values must also fit the other params. Only the search itself asks for that.
    """
    epochs = {params.search.epochs_key: params.search.epochs}
    for dimension in params.search.space:
        for value in (*dimension.extremes, *dimension.between):
            try:
                replaced(params, {**epochs, **dimension.when, dimension.key: value}, source)
            except ParamsError as error:
                if together or dimension.key in error.keys:
                    raise


def replaced(params: Params, values: Mapping[str, Any], source: str = "params") -> Params:
    """Returns a copy of `params` with `values` by key, such as `bcosify.pretrained.optim.lr`.

    Raises:
        ParamsError: there is no such key, or a value is not valid.
    """
    check_names(values, source)
    content = params.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        group: Any = content
        for name in path:
            group = group.get(name) if isinstance(group, dict) else None
        if not isinstance(group, dict) or last not in group:
            near = difflib.get_close_matches(last, group or (), n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ParamsError(f"{source}: {key!r} is not in the params{hint}", (key,))
        group[last] = value
    return _validated(content, source)


def param(params: Params, key: str) -> Any:
    """Returns the value of a key such as `bcosify.pretrained.optim.lr`."""
    return reduce(
        lambda group, name: group[name] if isinstance(group, dict) else getattr(group, name),
        key.split("."),
        params,
    )


def leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested `content` to keys such as `bcosify.pretrained.optim.lr`."""
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
        items = [item for item in reversed(error.errors()) if not _is_renamed(item, error)]
        lines = {_key(item): _explain(source, item) for item in items}  # one per key
        raise ParamsError("\n".join(reversed(lines.values())), tuple(lines)) from None


def _is_renamed(missing: Any, error: ValidationError) -> bool:
    """Returns True if a key is missing only because `error` has its former names."""
    today = [renamed(_key(item)) or "" for item in error.errors() if item["type"] == "extra_forbidden"]
    return missing["type"] == "missing" and any(f"{key}.".startswith(f"{_key(missing)}.") for key in today)


def _key(item: Any) -> str:
    """The key of a pydantic error, without pydantic's names of the branches of a union."""
    parts = [str(part) for part in item["loc"] if not re.search(r"\W", str(part)) and part != "int"]
    # The name of the source in datasets.NAME.SOURCE.KEY, and in datasets.NAME.mixture.of.0.SOURCE.KEY.
    for place in (2, 4):
        if (
            parts[:1] == ["datasets"]
            and len(parts) > place
            and parts[place] in SOURCES
            and (place == 2 or parts[2] == "of")
        ):
            parts.pop(place)
    return ".".join(parts) or "the file"


def _explain(source: str, item: Any) -> str:
    """One line for a pydantic error: the key, the value, what is allowed."""
    key = _key(item)
    if item["type"] == "extra_forbidden":
        today = renamed(key)
        return f"{source}: {key}: " + (
            f"renamed to {today}" if today else f"unknown key (value {item['input']!r})"
        )
    if item["type"] == "missing":
        return f"{source}: {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {key}: {message}" + (
        "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    )
