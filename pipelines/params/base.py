"""Building blocks of all groups of params: value types, the base class, and the error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from pipelines.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Exponent = Annotated[float, Field(ge=1.0)]  # B
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def odd(value: int) -> int:
    """Returns `value`; raises `ValueError` if it is even."""
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


class ParamsError(UserError, ValueError):
    """A bad key, type or value in the params, in one line. `keys` are the params that the error is about."""

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class Strict(BaseModel):
    """A group of params: unknown keys are errors, values are immutable.

    The docstring below a field describes the param. Its first sentence becomes the comment in params.yaml,
    all of it the text in docs/params.md (`python -m stages.tools.params`).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Sparse(Strict):
    """An item of a list, of which only the keys that were given are written."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


@contextmanager
def keyed(section: str, group: Strict) -> Iterator[None]:
    """Prefixes errors about a field of `group` with `section`: `select: ...` becomes `a.b.select: ...`.

    The type of the error stays the same. Library code knows the fields of a group, but not where the group
    stands in params.yaml.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if str(error).partition(":")[0] not in type(group).model_fields:
            raise
        raise type(error)(f"{section}.{error}") from error
