"""Paths and URLs that mean the same on every worker and in every copy of the project."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fsspec


def project_root() -> Path:
    """The project's folder; outside of DVC the working directory.

    DVC names it to its stages, also to those that it runs in a copy of git's files (`dvc exp run --temp`, `--queue`).
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def absolute(path: str | Path) -> str:
    """`path` as an absolute path or URL without a trailing slash, so that it means the same on every worker.

    A relative path that leaves the working directory (`../scratch`) starts in the project's folder instead.
    """
    text = str(path)
    if fsspec.utils.get_protocol(text) != "file":
        return text.rstrip("/")
    local = os.path.normpath(os.path.expanduser(text.removeprefix("file://")))
    return (
        os.path.normpath(project_root() / local) if local.split(os.sep)[0] == ".." else os.path.abspath(local)
    )


def users_path(path: str | Path) -> str:
    """The absolute path of what a user names in the params; a URL as it is, without a trailing slash.

    A relative path is looked for in the working directory, where git's files and the stages' outputs are, and then in the
    project's folder. The two differ in a copy that DVC makes for an experiment, which lacks the user's other files.
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
    """Whether a path has anything of a user's: a folder with hidden files alone, such as git's `.gitignore`, has not."""
    if not os.path.isdir(path) or not os.access(path, os.R_OK):
        return os.path.exists(path)
    return any(name[0] != "." for name in os.listdir(path))


def run_directory(storage: str | Path, stage: str, *inputs: Any) -> str:
    """`<storage>/<stage>/<hash of inputs>`, absolute: the same inputs find the same run again, others never do.

    Args:
        storage: a folder (made absolute) or an fsspec URL.
        stage: the stage's name.
        inputs: JSON values or pydantic models: all that the run's outcome depends on.
    """
    values = [item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in inputs]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    return f"{absolute(storage)}/{stage}/{name}"
