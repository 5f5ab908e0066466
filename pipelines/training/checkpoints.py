"""Checkpoints on any fsspec storage: written whole or not at all, read without unpickling.

    <directory>/checkpoints/step-00000123/state.pt        what `torch.save` wrote
    <directory>/checkpoints/step-00000123/complete.json   written last: a checkpoint without it does not exist

Of several checkpoints the newest complete one counts. Each function may be called again after an error, and is while a remote
storage fails for a while.
"""

from __future__ import annotations

import io
import re
from typing import Any

import torch

from pipelines.storage import files
from pipelines.storage.retry import retried

_STEP = re.compile(r"^step-(\d{8,})$")


def folder_of(directory: str, step: int) -> str:
    """The folder of the checkpoint of `step`."""
    return f"{directory}/checkpoints/step-{step:08d}"


@retried
def save(directory: str, step: int, state: dict[str, Any], summary: dict[str, Any], keep: set[int], last: int) -> None:
    """Writes the checkpoint of `step`; deletes all but the `last` newest and those of steps in `keep`.

    Args:
        directory: of the run.
        step: optimiser steps done.
        state: tensors, numbers, strings and containers of them (what `torch.load(weights_only=True)` reads).
        summary: JSON values, readable without the state.
        keep: steps whose checkpoints stay.
        last: how many of the newest stay.

    Raises:
        OSError: the storage refuses; nothing half is left, and no older checkpoint was touched.
    """
    folder = folder_of(directory, step)
    files.remove(folder)  # left by a run killed while writing, or damaged
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    try:
        files.write(f"{folder}/state.pt", content)
        files.write_json(f"{folder}/complete.json", {"step": step, "bytes": len(content), **summary})
    except OSError:
        files.remove(folder)
        raise
    _prune(directory, keep, last)


def _steps(directory: str) -> list[int]:
    """Steps that have a folder, complete or not, newest first."""
    return sorted(
        (int(match[1]) for match in map(_STEP.match, files.names_in(f"{directory}/checkpoints")) if match), reverse=True
    )


def _prune(directory: str, keep: set[int], last: int) -> None:
    """Deletes checkpoints, the marker first, so that a kill in between leaves none that seems complete."""
    complete = 0
    for step in _steps(directory):
        filesystem, folder = files.file_system(folder_of(directory, step))
        whole = filesystem.exists(f"{folder}/complete.json")
        complete += whole
        if whole and (complete <= last or step in keep):
            continue
        if whole:
            filesystem.rm(f"{folder}/complete.json")
        filesystem.rm(folder, recursive=True)


@retried
def newest(directory: str) -> dict[str, Any] | None:
    """The summary of the newest complete checkpoint, with its `step`; None if there is none."""
    for step in _steps(directory):
        filesystem, folder = files.file_system(folder_of(directory, step))
        summary = files.read_json(f"{folder_of(directory, step)}/complete.json")
        if summary is None:
            continue
        size = filesystem.size(f"{folder}/state.pt") if filesystem.exists(f"{folder}/state.pt") else 0
        if size == summary["bytes"]:
            return summary
        print(f"{folder}: damaged (state.pt has {size} bytes, not {summary['bytes']}); looking for an older one")
    return None


def copy(source: str, target: str) -> None:
    """Copies the complete checkpoints of the run in `source` to the run in `target`, the oldest first."""
    for step in reversed(_steps(source)):
        summary = files.read_json(f"{folder_of(source, step)}/complete.json")
        if summary is not None:
            files.write(f"{folder_of(target, step)}/state.pt", files.read(f"{folder_of(source, step)}/state.pt"))
            files.write_json(f"{folder_of(target, step)}/complete.json", summary)


def load(directory: str, step: int) -> dict[str, Any]:
    """The state of the checkpoint of `step`, on the CPU."""
    content = files.read(f"{folder_of(directory, step)}/state.pt")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
