"""docs/params.md: a table for each group of params, made from their models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines import params
from pipelines.params.base import Strict
from pipelines.params.data import SOURCES, DatasetParams
from stages.tools.params_schema import description, flow, group_of, item_of, kind

HEAD = """\
# Params

All params of `params.yaml`, in its order. `make params` writes both: the file from the recipes in
`pipelines/recipes`, and this page from the pydantic models in `pipelines/params`, which check the values.

Change a param for an experiment with `dvc exp run -S KEY=VALUE`, such as `-S pretrain.optim.lr=0.002`. Four
keys choose a file in `pipelines/recipes`: `-S recipe=NAME`, `-S dataset=NAME`, `-S guide=NAME` and `-S
model=NAME`. DVC then writes `params.yaml` anew, in the same order but without comments; `git checkout
params.yaml` restores the default run. An unknown key, or a value out of range, stops the stage with a
one-line error before any work starts.

`datasets` has only the data sets that a run uses. `-S dataset=NAME`, `-S guide=NAME` or a recipe takes one
from `pipelines/recipes/source`. `-S +source@datasets.NAME=NAME` adds one by hand, for instance `-S
+source@datasets.captions=captions -S clip.pairs=captions`.

*Default* is the value in the default recipe. A group may stand in several places, which are listed below its
heading. If its values differ between places, the most frequent value comes first; each other value has its
places in brackets.
"""


Places = dict[
    type[Strict], dict[str, Mapping[str, Any]]
]  # model -> place -> its params in the default recipe


def page(content: Mapping[str, Any]) -> str:
    """Returns the text of docs/params.md; `content` are the params of the default recipe."""
    places: Places = {}
    _find(params.Params, "", content, places)
    parts = [HEAD]
    for model, found in places.items():
        parts += _section(model, found)
        if model is params.Params:
            parts += _data_sets()
    return "\n".join(parts)


def _find(model: type[Strict], place: str, content: Mapping[str, Any], places: Places) -> None:
    """Collects the groups in a group, in the order of params.yaml."""
    places.setdefault(model, {})[place] = content
    for name in content or model.model_fields:
        inside, annotation = f"{place}.{name}".strip("."), model.model_fields[name].annotation
        if (inner := group_of(annotation)) and isinstance(content.get(name), Mapping):
            _find(inner, inside, content[name], places)
        elif item := item_of(annotation):
            _find(item, f"{inside}.*", {}, places)


def _section(model: type[Strict], places: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Heading, summary and table of a group."""
    fields = model.model_fields.items()
    knobs = [name for name, field in fields if not group_of(field.annotation) and name != "datasets"]
    if not knobs:
        return
    first, *others = places
    yield f"## {f'`{first}`' if first else 'The run'}\n"
    yield _summary(model)
    if others:
        yield f"The same params stand in {', '.join(f'`{place}`' for place in others)}.\n"
    known = places[first]
    yield from _table(model, knobs, {name: _defaults(name, places) for name in knobs if name in known})


def _data_sets() -> Iterator[str]:
    """The table of each source of images."""
    yield "## `datasets.NAME`\n"
    yield "Params of every data set. Its `source` decides how it is read and which further params it has."
    yield "The files in `pipelines/recipes/source` have the values of each data set.\n"
    yield from _table(DatasetParams, list(DatasetParams.model_fields))
    for source, model in SOURCES.items():
        knobs = [name for name in model.model_fields if name not in DatasetParams.model_fields]
        yield f"### `source: {source}`\n"
        yield _summary(model)
        yield from _table(model, [name for name in knobs if name != "source"])


def _summary(model: type[Strict]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split()) + "\n"


def _table(model: type[Strict], knobs: list[str], defaults: Mapping[str, str] | None = None) -> Iterator[str]:
    """Rows of param, type and range, default, meaning."""
    schemas = model.model_json_schema()["properties"]
    yield "| param | type and range | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name in knobs:
        field = model.model_fields[name]
        own = "required" if field.is_required() else _shown(schemas[name].get("default"))
        cells = (f"`{name}`", kind(schemas[name]), (defaults or {}).get(name, own), description(model, name))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _defaults(name: str, places: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the value of a knob. If places differ, each value with its places, the most frequent first."""
    found: dict[str, list[str]] = {}
    for place, content in places.items():
        found.setdefault(_shown(content[name]), []).append(f"`{place.removesuffix('.optim')}`")
    (common, _), *others = sorted(found.items(), key=lambda each: -len(each[1]))
    return "; ".join([common, *(f"{value} ({', '.join(where)})" for value, where in others)])


def _shown(value: Any) -> str:
    nested = isinstance(value, list) and any(isinstance(each, Mapping) for each in value)
    return f"{len(value)} entries" if nested else f"`{flow(value)}`"
