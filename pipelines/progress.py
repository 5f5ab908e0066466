"""Progress of long work: bars on standard error, or a line a minute if there is no terminal."""

from __future__ import annotations

import sys
from typing import Any, Literal

from tqdm import tqdm

_UNITS: dict[str, dict[str, Any]] = {
    "bytes": {"unit": "B", "unit_scale": True, "unit_divisor": 1024},
    "items": {"unit": ""},
}
_LINES = {  # without a terminal: nothing of work that is done within a minute
    "mininterval": 60.0,
    "maxinterval": 60.0,
    "delay": 60.0,
    "leave": False,
    "bar_format": "{desc}: {n_fmt}/{total_fmt}, {remaining} left{postfix}\n",
}


def bar(
    what: str,
    total: int | None,
    *,
    unit: Literal["bytes", "items"] = "items",
    done: int = 0,
    show: bool = True,
) -> tqdm:
    """A bar that starts at `done`, a context manager: `update(step)` advances it by bytes or items."""
    settings: dict[str, Any] = {} if sys.stderr.isatty() else _LINES
    return tqdm(desc=what, total=total, initial=done, disable=not show, **_UNITS[unit], **settings)


def epoch_line(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """One line that sums up an epoch; figures of single layers (`train/b/<layer>`) are for the history."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") == 1)
    return f"epoch {epoch}/{epochs}: {values}"
