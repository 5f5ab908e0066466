"""Watches what this process writes to the file system."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Audit events whose first argument is a path, and events whose first two arguments are paths.
_ONE, _TWO = (
    ("os.mkdir", "os.rmdir", "os.remove", "os.truncate"),
    ("os.rename", "os.link", "os.symlink"),
)
_inside: Path | None = None
_outside: list[str] = []
_installed = False


def _watch(event: str, arguments: tuple) -> None:
    """Audit hook: records paths outside of `_inside` that the process changes or opens for writing."""
    if _inside is None:
        return
    if event == "open":
        path, _, flags = arguments
        paths = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else []
    else:
        paths = list(arguments[: 1 if event in _ONE else 2 if event in _TWO else 0])
        paths = paths[event in ("os.link", "os.symlink") :]  # a link does not change its target
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path) != os.devnull:
            place = os.path.abspath(os.fsdecode(path))
            if (
                Path(place).suffix != ".pyc"
                and "__pycache__" not in place
                and not Path(place).is_relative_to(_inside)
            ):
                _outside.append(place)


@contextmanager
def writes_only_in(folder: Path) -> Iterator[None]:
    """Asserts that the block changes files only in `folder`. Changes by non-Python libraries go unnoticed."""
    global _inside, _installed
    if not _installed:
        sys.addaudithook(_watch)  # audit hooks cannot be removed
        _installed = True
    _outside.clear()
    _inside = folder.resolve()
    try:
        yield
    finally:
        _inside = None
    assert _outside == []


@contextmanager
def own_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs the block in a new folder, and asserts that it writes nowhere else."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with writes_only_in(folder):
        yield folder
