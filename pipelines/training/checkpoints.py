"""Checkpoints on any fsspec storage: written whole or not at all, read without unpickling.

    <directory>/checkpoints/step-00000123-00000002-5f3c9a01/state.pt        what `torch.save` wrote
    <directory>/checkpoints/step-00000123-00000002-5f3c9a01/complete.json   written last: without it there is no checkpoint

The name has the step and the token of the writer's lease (see `storage.lease`), so that no writer can touch the checkpoint of a
later one. Of several complete checkpoints the newest counts: of the latest writer, and of those the one of the highest step. Each
function may be called again after an error, and is while a remote storage fails for a while.
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
    """Name of a checkpoint's folder, complete or not; they sort from the oldest to the newest."""

    number: int  # of the writer's token; 0 if it had no lease
    step: int
    nonce: str  # of the token

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f"-{self.number:08d}-{self.nonce}" if self.number else "")

    def at(self, directory: str) -> str:
        """Its path or URL in the run's directory."""
        return f"{directory}/checkpoints/{self}"


def folder_of(step: int, lease: Lease | None) -> Folder:
    """The folder of the checkpoint of `step` that the holder of `lease` writes."""
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
    """Writes the checkpoint of `step`; deletes all but the `last` newest and those of steps in `keep`.

    Args:
        directory: of the run.
        step: optimiser steps done.
        state: tensors, numbers, strings and containers of them (what `torch.load(weights_only=True)` reads).
        summary: JSON values, readable without the state.
        keep: steps whose checkpoints stay.
        last: how many of the newest stay.
        lease: of the writer; None if there can be no other writer.

    Raises:
        LeaseError: another driver has taken over the directory; nothing of it was touched.
        OSError: the storage refuses; nothing half is left, and no older checkpoint was touched.
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
    """Raises an error if another writer has taken over."""
    if lease is not None:
        lease.check_newest()


def _folders(directory: str) -> list[Folder]:
    """All checkpoints, complete or not, the newest first."""
    matches = map(_NAME.match, files.names_in(f"{directory}/checkpoints"))
    return sorted(
        (Folder(int(match[2] or 0), int(match[1]), match[3] or "") for match in matches if match),
        reverse=True,
    )


def _summary(directory: str, folder: Folder) -> dict[str, Any] | None:
    """The summary of a checkpoint; None if it is not complete."""
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
    """Deletes checkpoints, the marker first, so that a kill in between leaves none that seems complete.

    Those of a later writer stay, and those of earlier writers for steps that were gone over again go.
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
    """The summary of the newest complete checkpoint, with its `step`; None if there is none."""
    return next(filter(None, (_summary(directory, folder) for folder in _folders(directory))), None)


def copy(source: str, target: str, lease: Lease | None = None) -> None:
    """Copies the complete checkpoints of the run in `source` to the run in `target`, the oldest first.

    Args:
        source: directory of a run.
        target: directory of a run without checkpoints.
        lease: of the writer to `target`.
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
    """The state of the newest complete checkpoint of `step`, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: its content is not what was written.
    """
    for folder in _folders(directory):
        if folder.step == step and (summary := _summary(directory, folder)) is not None:
            place = folder.at(directory)
            content = files.read(f"{place}/state.pt")
            if summary.get("sha256", sha256 := hashlib.sha256(content).hexdigest()) != sha256:
                raise DamagedFileError(
                    f"{place}/state.pt: damaged (its sha256 is another); delete {place} to go on from an older one"
                )
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{directory}: no complete checkpoint of step {step}")
