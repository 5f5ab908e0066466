"""Where a run comes from: the git commit, the hashes of its inputs, the versions of Python and torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipelines.storage.files import file_digest
from pipelines.storage.model_folder import CONFIG, TEXT_CONFIG, TEXT_WEIGHTS, WEIGHTS
from pipelines.storage.paths import project_root

DIGEST = "content.sha256"  # tag: `content_digest` of the model's files
MODEL = (WEIGHTS, CONFIG)
TEXT_TOWER = (TEXT_WEIGHTS, TEXT_CONFIG)
EXPERIMENT = "dvc.experiment"  # tag: name of the DVC experiment


def git_tags(directory: str | Path | None = None) -> dict[str, str]:
    """Returns tags with the checked-out commit and whether tracked files differ from it.

    The repository is that of `directory`, by default of the working directory. Changes of `dvc.lock` do not
    count, because every stage changes it. Outside a repository, a submitted job takes the tags from its
    environment (`SUBMITTED_COMMIT`, `SUBMITTED_DIRTY`); elsewhere there are none.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    except (OSError, subprocess.SubprocessError):
        told = {"mlflow.source.git.commit": "SUBMITTED_COMMIT", "git.dirty": "SUBMITTED_DIRTY"}
        return {tag: os.environ[name] for tag, name in told.items() if os.environ.get(name)}
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(changed)).lower()}


def lock_hash(inputs: Mapping[str, str], lock_file: str | Path = "dvc.lock") -> str:
    """Returns one sha256 over a stage's inputs as `dvc.lock` records them.

    While a stage runs, the lock has the inputs of its last execution, but already the outputs of the stages
    before it. So each input is looked up among the outputs of all stages.

    Args:
        inputs: name -> path of an input, or any text that identifies an input that no stage makes.
        lock_file: path of the lock; a missing file counts as an empty one.
    """
    return hashlib.sha256(json.dumps(input_hashes(inputs, lock_file), sort_keys=True).encode()).hexdigest()


def input_hashes(inputs: Mapping[str, str], lock_file: str | Path = "dvc.lock") -> dict[str, str]:
    """Returns the hash that `dvc.lock` records of each input or a folder around it; else the text itself."""
    recorded = _recorded_outputs(Path(lock_file))

    def find(path: str) -> str:
        candidates = [Path(path), *Path(path).parents]
        return next((recorded[item.as_posix()] for item in candidates if item.as_posix() in recorded), path)

    return {name: find(_relative(path)) for name, path in inputs.items()}


def experiment_tags() -> dict[str, str]:
    """Returns a tag with the name of the DVC experiment that runs this stage; empty under `dvc repro`."""
    name = os.environ.get("DVC_EXP_NAME")
    return {EXPERIMENT: name} if name else {}


def model_files(directory: str | Path) -> list[Path]:
    """Returns the files of the model in a folder, then those of its text tower if the folder has one."""
    names = MODEL + (TEXT_TOWER if all(Path(directory, name).is_file() for name in TEXT_TOWER) else ())
    return [Path(directory, name) for name in names]


def content_digest(files: Iterable[Path]) -> str:
    """Returns the sha256 over the names and contents of `files`, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def version_tags() -> dict[str, str]:
    """Returns tags with the versions of Python and torch."""
    return {"python": platform.python_version(), "torch": version("torch")}


def _relative(path: str) -> str:
    """Returns `path` as the lock writes it: relative to the project if it lies inside."""
    for root in (Path.cwd(), project_root()):
        if Path(path).is_relative_to(root):
            return Path(path).relative_to(root).as_posix()
    return path


def _recorded_outputs(lock_file: Path) -> dict[str, str]:
    if not lock_file.is_file():
        return {}
    lock: dict[str, Any] = yaml.safe_load(lock_file.read_text()) or {}
    outputs = [item for stage in lock.get("stages", {}).values() for item in stage.get("outs", [])]
    return {
        item["path"]: next(item[kind] for kind in (item.get("hash", "md5"), "md5", "etag") if kind in item)
        for item in outputs
    }
