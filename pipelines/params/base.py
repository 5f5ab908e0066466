"""What all groups of params are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pipelines.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Exponent = Annotated[float, Field(ge=1.0)]  # B
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def odd(value: int) -> int:
    """`value`, which must be odd."""
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


class ParamsError(UserError, ValueError):
    """A bad key, type or value in the params: one line that names it and what is allowed; `keys` are those it is about."""

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class Strict(BaseModel):
    """A group of params: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


@contextmanager
def keyed(section: str, group: Strict) -> Iterator[None]:
    """Puts `section` before an error in the block that begins with a field of `group`: `a.b.select: ...` for `select: ...`.

    The type of the error stays. Library code knows the fields of a group, but not where the group stands in params.yaml.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if str(error).partition(":")[0] not in type(group).model_fields:
            raise
        raise type(error)(f"{section}.{error}") from error
