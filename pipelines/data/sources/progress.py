"""Progress bars with a rate and the time left, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        """The rate, once there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def bar(
    what: str, total: int | None, *, unit: Literal["bytes", "items"] = "items", done: int = 0, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Gives the function that moves the bar on by so many bytes or items; `done` were there before."""
    columns = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _Rate())
    with Progress(
        TextColumn(what), BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show
    ) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda step: progress.advance(task, step)
