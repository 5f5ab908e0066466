"""Former keys of params, so that an error can name the key of today."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipelines.params.base import ParamsError

_METHODS = (
    r"(pretrain|bcosify\.(?:pretrained|scratch)|distill\.(?:kd|e2kd)|guide\.(?:classify|guided)"
    r"|clip\.(?:cnn|vit)\.(?:pretrain|bcosify))"
)
_OPTIM = (
    r"(epochs|batch_size|optimiser|lr|weight_decay|schedule|warmup_steps|clip|clip_value"
    r"|patience|validate_every)"
)

RENAMES = {  # pattern of a former key -> the key of today
    r"training\.storage": "storage.root",
    rf"{_METHODS}\.{_OPTIM}": r"\1.optim.\2",
}


def renamed(key: str) -> str | None:
    """Returns the key of today if `key` is a former one, otherwise None."""
    for former, today in RENAMES.items():
        if found := re.fullmatch(former, key):
            return found.expand(today)
    return None


def check_names(keys: Iterable[str], source: str = "params") -> None:
    """Raises `ParamsError` if a key of `keys` is a former one; the error names the key of today."""
    for key in keys:
        if today := renamed(key):
            raise ParamsError(f"{source}: {key}: renamed to {today}", (key,))
