"""Checkpoints on any fsspec storage: written whole or not at all, read without unpickling.

    <directory>/checkpoints/step-00000123-00000002-5f3c9a01/state.pt        the state, by `torch.save`
    <directory>/checkpoints/step-00000123-00000002-5f3c9a01/complete.json   the summary, written last

A folder without `complete.json` is not a checkpoint. The folder's name has the step and the token of the
writer's lease (see `storage.lease`), so that no writer can touch the checkpoint of a later one. A run resumes
from its newest complete checkpoint: the one with the highest step among those of the latest writer. Each
function can be repeated after an error, and access to a remote storage is retried for a while (see `retry`).
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.storage import files
from pipelines.storage.errors import DamagedFileError
from pipelines.storage.lease import Lease
from pipelines.storage.retry import retried

_NAME = re.compile(r"^step-(\d{8,})(?:-(\d{8,})-([0-9a-f]+))?$")


@dataclass(frozen=True, order=True)
class Folder:
    """Name of a checkpoint's folder, complete or not. Names sort from the oldest to the newest."""

    number: int  # number in the writer's token; 0 for a writer without lease
    step: int
    nonce: str  # random part of the writer's token

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f"-{self.number:08d}-{self.nonce}" if self.number else "")

    def at(self, directory: str) -> str:
        """Returns the folder's path or URL in a run's directory."""
        return f"{directory}/checkpoints/{self}"


def folder_of(step: int, lease: Lease | None) -> Folder:
    """Returns the folder to which the holder of `lease` writes the checkpoint of `step`."""
    return Folder(lease.number, step, lease.nonce) if lease else Folder(0, step, "")


@retried
def save(
    directory: str,
    step: int,
    state: dict[str, Any],
    summary: dict[str, Any],
    keep: set[int],
    last: int,
    lease: Lease | None = None,
) -> None:
    """Writes the checkpoint of `step`, then deletes all but the `last` newest and those in `keep`.

    Args:
        directory: the run's directory.
        step: optimiser steps done.
        state: tensors, numbers, strings and containers of them, as `torch.load(weights_only=True)` reads
            them.
        summary: JSON values that can be read without the state.
        keep: steps whose checkpoints stay.
        last: number of newest checkpoints that stay.
        lease: the writer's lease; `None` if there can be no other writer.

    Raises:
        LeaseError: another driver has taken over the directory; its checkpoints were not touched.
        OSError: the storage refuses. No partial checkpoint is left, and no older one was touched.
    """
    folder = folder_of(step, lease)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    try:
        _check(lease)
        files.write(f"{folder.at(directory)}/state.pt", content)
        _check(lease)
        known = {"step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files.write_json(f"{folder.at(directory)}/complete.json", {**known, **summary})
    except OSError:
        files.remove(folder.at(directory))
        _check(lease)
        raise
    _prune(directory, folder, keep, last, lease)


def _check(lease: Lease | None) -> None:
    """Raises `LeaseError` or `StorageError` if another writer has taken over, see `Lease.check_newest`."""
    if lease is not None:
        lease.check_newest()


def _folders(directory: str) -> list[Folder]:
    """Returns the folders of all checkpoints, complete or not, the newest first."""
    matches = map(_NAME.match, files.names_in(f"{directory}/checkpoints"))
    return sorted(
        (Folder(int(match[2] or 0), int(match[1]), match[3] or "") for match in matches if match),
        reverse=True,
    )


def _summary(directory: str, folder: Folder) -> dict[str, Any] | None:
    """Returns the summary of a checkpoint, or `None` if it is incomplete or its state has another size."""
    place = folder.at(directory)
    summary = files.read_record(f"{place}/complete.json", dict)
    if summary is None or not {"step", "bytes"} <= summary.keys():
        return None
    filesystem, state = files.file_system(f"{place}/state.pt")
    size = filesystem.size(state) if filesystem.exists(state) else 0
    if size == summary["bytes"]:
        return summary
    print(f"{place}: damaged (state.pt has {size} bytes, not {summary['bytes']}); looking for an older one")
    return None


def _prune(directory: str, written: Folder, keep: set[int], last: int, lease: Lease | None) -> None:
    """Deletes all but the `last` newest checkpoints and those in `keep`, after `written` was written.

    `complete.json` is deleted first, so that a kill in between leaves no checkpoint that seems complete.
    Checkpoints of later writers stay. Incomplete checkpoints of other writers go. So does an earlier writer's
    checkpoint if its step is not below that of `written`, or if a newer checkpoint has the same step.
    """
    steps: set[int] = set()
    for folder in _folders(directory):
        own = (folder.number, folder.nonce) == (written.number, written.nonce)
        if not own and folder.number >= written.number:
            continue
        again = folder.step in steps or (not own and folder.step >= written.step)
        if not again and _summary(directory, folder) is not None:
            steps.add(folder.step)
            if len(steps) <= last or folder.step in keep:
                continue
        _check(lease)
        files.remove(f"{folder.at(directory)}/complete.json")
        files.remove(folder.at(directory))


@retried
def newest(directory: str) -> dict[str, Any] | None:
    """Returns the summary, `step` included, of the newest complete checkpoint, or `None` without one."""
    return next(filter(None, (_summary(directory, folder) for folder in _folders(directory))), None)


def steps(directory: str) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    return sorted({folder.step for folder in _folders(directory) if _summary(directory, folder) is not None})


def copy(source: str, target: str, lease: Lease | None = None) -> None:
    """Copies the complete checkpoints of the run in `source` to the run in `target`, the oldest first.

    Args:
        source: directory of a run.
        target: directory of a run without checkpoints.
        lease: lease of `target`; `None` if there can be no other writer.
    """
    newest_of_source = newest(source)
    for folder in reversed(_folders(source)):
        summary = _summary(source, folder)
        if newest_of_source is None or summary is None or folder.step > newest_of_source["step"]:
            continue
        place = folder_of(folder.step, lease).at(target)
        _check(lease)
        files.write(f"{place}/state.pt", files.read(f"{folder.at(source)}/state.pt"))
        files.write_json(f"{place}/complete.json", summary)


def load(directory: str, step: int) -> dict[str, Any]:
    """Returns the state, on the CPU, of the newest complete checkpoint of `step`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedFileError: the sha256 of the state is not the one in the summary.
    """
    for folder in _folders(directory):
        if folder.step == step and (summary := _summary(directory, folder)) is not None:
            place = folder.at(directory)
            content = files.read(f"{place}/state.pt")
            if summary.get("sha256", sha256 := hashlib.sha256(content).hexdigest()) != sha256:
                raise DamagedFileError(
                    f"{place}/state.pt: damaged (its sha256 is another); "
                    f"delete {place} to go on from an older one"
                )
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{directory}: no complete checkpoint of step {step}")
