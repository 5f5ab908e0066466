"""Paths and URLs that mean the same on every worker."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fsspec


def absolute(path: str | Path) -> str:
    """`path` as an absolute path or URL without a trailing slash, so that it means the same on every worker."""
    text = str(path)
    if fsspec.utils.get_protocol(text) != "file":
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text.removeprefix("file://")))


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
