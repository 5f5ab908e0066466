"""Description, type and range of each param, read from the pydantic models of the params."""

from __future__ import annotations

import inspect
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from pipelines.params.base import Strict


def group_of(annotation: Any) -> type[Strict] | None:
    """Returns the model of a field that is a group of params; None if it is a knob."""
    union = get_origin(annotation) in (Union, UnionType)
    classes = get_args(annotation) if union else (annotation,)
    return next((each for each in classes if inspect.isclass(each) and issubclass(each, Strict)), None)


def item_of(annotation: Any) -> type[Strict] | None:
    """Returns the model of a list's items or a dict's values; None if they are no groups of params."""
    return group_of(get_args(annotation)[-1]) if get_origin(annotation) in (list, dict) else None


def description(model: type[Strict], name: str) -> str:
    """Returns the docstring of a field, which it may inherit, on one line."""
    known = (base.model_fields.get(name) for base in model.__mro__ if issubclass(base, Strict))
    return " ".join(next((field.description for field in known if field and field.description), "").split())


def first_sentence(text: str) -> str:
    """Returns the first sentence of `text` without its full stop."""
    return re.split(r"\.(?: |$)", text, maxsplit=1)[0]


def choices(annotation: Any) -> tuple[Any, ...]:
    """Returns the values of the Literal in an annotation, also as the items of a list."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is dict:
        return ()
    return tuple(value for part in get_args(annotation) for value in choices(part))


def kind(schema: dict[str, Any]) -> str:
    """Returns the type and range of a JSON schema in words, such as `integer ≥ 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(map(kind, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema or "oneOf" in schema:
        return "mapping"
    if "prefixItems" in schema:
        return f"[{', '.join(map(kind, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    if "additionalProperties" in schema and isinstance(schema["additionalProperties"], dict):
        keys = "split" if "enum" in schema.get("propertyNames", {}) else "name"
        return f"{keys} → {kind(schema['additionalProperties'])}"
    return {"boolean": "true, false", "object": "mapping", "string": _text(schema)}.get(
        schema.get("type", ""), f"{schema.get('type', 'any')}{_range(schema)}"
    )


def _text(schema: dict[str, Any]) -> str:
    return "sha256" if "{64}" in schema.get("pattern", "") else "text"


def _range(schema: dict[str, Any]) -> str:
    """Returns the bounds of a number: `in [0, 1]`, `≥ 1`, `> 0` or nothing."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")
    if high is not None:
        return f" in [{low:g}, {high:g}]" if low is not None else f" in ({above:g}, {high:g}]"
    if above is not None:
        return " ≥ 1" if schema["type"] == "integer" and above == 0 else f" > {above:g}"
    return "" if low is None else f" ≥ {low:g}"


def flow(value: Any) -> str:
    """Returns `value` as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
