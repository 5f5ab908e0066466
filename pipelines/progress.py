"""Progress of long work: bars on standard error, or one line per minute if there is no terminal."""

from __future__ import annotations

import sys
from typing import Any, Literal

from tqdm import tqdm

_UNITS: dict[str, dict[str, Any]] = {
    "bytes": {"unit": "B", "unit_scale": True, "unit_divisor": 1024},
    "items": {"unit": ""},
}
_LINES = {  # settings without a terminal: one line per minute, the first one after a minute
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
    """A progress bar (context manager) that starts at `done`; `update(step)` advances it by `step` units."""
    settings: dict[str, Any] = {} if sys.stderr.isatty() else _LINES
    return tqdm(desc=what, total=total, initial=done, disable=not show, **_UNITS[unit], **settings)


def epoch_line(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """One line with the metrics of an epoch, without the per-layer ones (`train/b/<layer>`)."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") == 1)
    return f"epoch {epoch}/{epochs}: {values}"
