"""Paths and URLs that name the same place on every worker and in every copy of the project."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fsspec


def project_root() -> Path:
    """The project's folder: `DVC_ROOT` if DVC runs the stage, else the working directory.

    If DVC runs the stage in a copy of the repository (`dvc exp run --temp`, `--queue`), `DVC_ROOT` still
    names the original.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def absolute(path: str | Path) -> str:
    """`path` as an absolute path or URL without a trailing slash, valid on every worker.

    A relative path is resolved against the working directory. If it begins with `..` (`../scratch`), it is
    resolved against the project's folder.
    """
    text = str(path)
    if fsspec.utils.get_protocol(text) != "file":
        return text.rstrip("/")
    local = os.path.normpath(os.path.expanduser(text.removeprefix("file://")))
    return (
        os.path.normpath(project_root() / local) if local.split(os.sep)[0] == ".." else os.path.abspath(local)
    )


def users_path(path: str | Path) -> str:
    """The absolute path of a path from the params; a URL is returned without its trailing slash.

    A path below the working directory where nothing lies is resolved against the project's folder instead.
    The two folders differ if DVC runs an experiment in a copy of the repository: the copy has the tracked
    files and the stages' outputs, but not the user's other files.
    """
    here = absolute(path)
    if (
        fsspec.utils.get_protocol(here) != "file"
        or _is_there(here)
        or not Path(here).is_relative_to(Path.cwd())
    ):
        return here
    return str(project_root() / Path(here).relative_to(Path.cwd()))


def _is_there(path: str) -> bool:
    """True for a file, and for a folder unless it is readable and has hidden files only (`.gitignore`)."""
    if not os.path.isdir(path) or not os.access(path, os.R_OK):
        return os.path.exists(path)
    return any(name[0] != "." for name in os.listdir(path))


def run_directory(storage: str | Path, stage: str, *inputs: Any) -> str:
    """`<storage>/<stage>/<hash of inputs>`, absolute. Only equal inputs give the same directory.

    Args:
        storage: a folder (made absolute) or an fsspec URL.
        stage: the stage's name.
        inputs: JSON values or pydantic models; everything that the run's outcome depends on.
    """
    values = [item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in inputs]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    return f"{absolute(storage)}/{stage}/{name}"
