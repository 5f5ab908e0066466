"""Progress of long work: bars on standard error, or lines if there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        """The rate, empty before the first step."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def bar(
    what: str, total: int | None, *, unit: Literal["bytes", "items"] = "items", done: int = 0, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows a bar that starts at `done`; gives the function that advances it by bytes or items."""
    columns = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _Rate())
    with Progress(
        TextColumn(what), BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show
    ) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda step: progress.advance(task, step)


_LINE_EVERY = 60.0  # seconds, where there is no terminal


class EpochProgress:
    """Shows the progress of an epoch, on rank 0 alone. A context manager."""

    def __init__(self, epoch: int, epochs: int, steps: int, start: int, shown: bool) -> None:
        """Epoch `epoch` of `epochs` has `steps` steps, of which `start` were done before."""
        self._title = f"epoch {epoch}/{epochs}"
        self._steps, self._first, self._done = steps, start, start
        self._shown = shown
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=steps, completed=start, note="")

    def __enter__(self) -> EpochProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()

    def step(self) -> None:
        """Advances by one step."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)

    def note(self, loss: float, images_per_second: float) -> None:
        """Shows the loss and the rate: beside the bar, or as a line if the last one is a minute old."""
        text = f"loss {loss:.4g}, {images_per_second:.1f} images/s"
        if self._bar:
            self._bar.update(self._task, note=text)
        elif self._shown and time.monotonic() - self._printed > _LINE_EVERY:
            self._printed = time.monotonic()
            left = (self._printed - self._began) / (self._done - self._first) * (self._steps - self._done)
            print(f"{self._title}, step {self._done}/{self._steps}: {text}, {left / 60:.0f} min left", flush=True)


def epoch_line(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """One line that sums up an epoch; figures of single layers (`train/b/<layer>`) are for the history."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") == 1)
    return f"epoch {epoch}/{epochs}: {values}"
