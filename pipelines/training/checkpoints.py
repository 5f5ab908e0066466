"""Checkpoints on any fsspec storage: written whole or not at all, read without unpickling.

    <directory>/checkpoints/step-00000123/state.pt        what `torch.save` wrote
    <directory>/checkpoints/step-00000123/complete.json   written last: a checkpoint without it does not exist
    <directory>/history.json, reported.json

A file appears on an object store once it is uploaded, on a local disk under a temporary name first, so that neither
shows half a file under the final one. Of several checkpoints the newest complete one counts. Storage that fails for a while is
tried again: each function may be called again after an error.
"""

from __future__ import annotations

import io
import json
import re
import uuid
from pathlib import PurePosixPath
from typing import Any

import fsspec
import torch

from pipelines.storage.retry import make_folder, patient

_STEP = re.compile(r"^step-(\d{8,})$")


def _open(directory: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `directory`, not from a cached listing, and the path on it."""
    filesystem, path = fsspec.core.url_to_fs(directory, use_listings_cache=False)
    return filesystem, path.rstrip("/")


def _write(filesystem: fsspec.AbstractFileSystem, path: str, content: bytes | memoryview) -> None:
    """Writes `path` so that it is there whole or not at all."""
    make_folder(filesystem, str(PurePosixPath(path).parent))
    local = "file" in filesystem.protocol
    target = f"{path}.{uuid.uuid4().hex}.partial" if local else path
    try:
        with filesystem.open(target, "wb") as file:
            file.write(content)
        if local:
            filesystem.mv(target, path)
    except FileNotFoundError as error:  # of a bucket, its storage says no more than that
        raise FileNotFoundError(f"{filesystem.unstrip_protocol(path)}: {error}") from None
    except OSError:
        if filesystem.exists(target):
            filesystem.rm(target)
        raise


@patient
def save(directory: str, step: int, state: dict[str, Any], summary: dict[str, Any], keep: set[int], last: int) -> None:
    """Writes the checkpoint of `step`, then deletes all but the `last` newest and those of the steps in `keep`.

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
    filesystem, root = _open(directory)
    folder = f"{root}/checkpoints/step-{step:08d}"
    if filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)  # left by a run killed while writing, or damaged
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    try:
        _write(filesystem, f"{folder}/state.pt", content)
        marker = {"step": step, "bytes": len(content), **summary}
        _write(filesystem, f"{folder}/complete.json", json.dumps(marker).encode())
    except OSError:
        if filesystem.exists(folder):
            filesystem.rm(folder, recursive=True)
        raise
    _prune(filesystem, root, keep, last)


def _steps(filesystem: fsspec.AbstractFileSystem, root: str) -> list[int]:
    """Steps that have a folder, complete or not, newest first."""
    if not filesystem.exists(f"{root}/checkpoints"):
        return []
    names = (PurePosixPath(path).name for path in filesystem.ls(f"{root}/checkpoints", detail=False))
    return sorted((int(match[1]) for match in map(_STEP.match, names) if match), reverse=True)


def _prune(filesystem: fsspec.AbstractFileSystem, root: str, keep: set[int], last: int) -> None:
    """Deletes checkpoints, each one's marker first, so that a kill in between leaves none that seems whole."""
    complete = 0
    for step in _steps(filesystem, root):
        folder = f"{root}/checkpoints/step-{step:08d}"
        whole = filesystem.exists(f"{folder}/complete.json")
        complete += whole
        if whole and (complete <= last or step in keep):
            continue
        if whole:
            filesystem.rm(f"{folder}/complete.json")
        filesystem.rm(folder, recursive=True)


@patient
def newest(directory: str) -> dict[str, Any] | None:
    """The summary of the newest complete checkpoint, with its `step`; None where there is none."""
    filesystem, root = _open(directory)
    for step in _steps(filesystem, root):
        folder = f"{root}/checkpoints/step-{step:08d}"
        if not filesystem.exists(f"{folder}/complete.json"):
            continue
        summary = json.loads(filesystem.cat_file(f"{folder}/complete.json"))
        size = filesystem.size(f"{folder}/state.pt") if filesystem.exists(f"{folder}/state.pt") else 0
        if size == summary["bytes"]:
            return summary
        print(f"{folder}: damaged (state.pt has {size} bytes, not {summary['bytes']}); looking for an older one")
    return None


def copy(source: str, target: str) -> None:
    """Copies the complete checkpoints of the run in `source` to the run in `target`, the oldest first."""
    filesystem, root = _open(source)
    there, other = _open(target)
    for step in reversed(_steps(filesystem, root)):
        folder, names = f"checkpoints/step-{step:08d}", ("state.pt", "complete.json")
        if filesystem.exists(f"{root}/{folder}/complete.json"):
            for name in names:
                _write(there, f"{other}/{folder}/{name}", filesystem.cat_file(f"{root}/{folder}/{name}"))


@patient
def load(directory: str, step: int) -> dict[str, Any]:
    """The state of the checkpoint of `step`, on the CPU."""
    filesystem, root = _open(directory)
    content = filesystem.cat_file(f"{root}/checkpoints/step-{step:08d}/state.pt")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


@patient
def write_json(directory: str, name: str, value: Any) -> None:
    """Writes `value` as `<directory>/<name>`, whole or not at all."""
    filesystem, root = _open(directory)
    _write(filesystem, f"{root}/{name}", json.dumps(value, indent=1).encode())


@patient
def read_json(directory: str, name: str) -> Any:
    """The value of `<directory>/<name>`, None where there is no such file."""
    filesystem, root = _open(directory)
    return json.loads(filesystem.cat_file(f"{root}/{name}")) if filesystem.exists(f"{root}/{name}") else None


@patient
def folders(directory: str) -> list[str]:
    """Names of the folders in `directory`, none where that does not exist."""
    filesystem, root = _open(directory)
    return [PurePosixPath(path).name for path in filesystem.ls(root, detail=False)] if filesystem.exists(root) else []


@patient
def remove(directory: str) -> None:
    """Deletes `directory` with all that is in it, if it is there."""
    filesystem, root = _open(directory)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)
