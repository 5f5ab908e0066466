"""The journal of a stage's tracked run on disk, written before and without any server."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pipelines.storage import files


class MetricRow(TypedDict):
    """One value of one metric; `timestamp` in milliseconds."""

    key: str
    value: float
    step: int
    timestamp: int


class Journal:
    """One execution of a stage in `<directory>/tracking/`.

    The folder has `run.json`, `metrics.jsonl` and a tree of `artifacts`.
    Nothing is held in memory: any process may read the folder, and the one that tracks may append.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.root = self.directory / "tracking"
        self.artifacts = self.root / "artifacts"

    @property
    def exists(self) -> bool:
        """Whether an execution was tracked here."""
        return (self.root / "run.json").is_file()

    def begin(
        self, stage: str, experiment: str, params: Mapping[str, str], tags: Mapping[str, str], key: str | None = None
    ) -> None:
        """Opens the journal of the unfinished execution found here, which then goes on, or of a new one.

        The params of one that goes on stay those it started with; its tags become `tags`. `key` names one that began elsewhere.
        """
        if self.exists and self.head["status"] != "FINISHED":
            self.update(status="RUNNING", tags={**self.head["tags"], **tags}, warned=False, ended=None)
            return
        if self.root.exists():
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True)
        head = {"key": key or secrets.token_hex(8), "stage": stage, "experiment": experiment, "started": now(), "ended": None}
        head |= {
            "status": "RUNNING",
            "logged": False,
            "warned": False,
            "params": dict(params),
            "tags": dict(tags),
            "datasets": [],
        }
        files.write_json(self.root / "run.json", head)

    @property
    def head(self) -> dict[str, Any]:
        """Everything but metrics and artifacts."""
        return files.read_json(self.root / "run.json")

    def update(self, **values: Any) -> None:
        """Replaces values of the head."""
        files.write_json(self.root / "run.json", {**self.head, **values})

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends metrics that are not there yet: a metric keeps its first value per step."""
        known = {(row["key"], row["step"]) for row in self.metrics()}
        rows = [row for row in metric_rows(metrics, step) if (row["key"], row["step"]) not in known]
        with open(self.root / "metrics.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[MetricRow]:
        """All metrics in their order. A last line that was cut by a kill is dropped, from the file too."""
        path = self.root / "metrics.jsonl"
        if not path.is_file():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def add_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copies a file, or a folder's files, to `folder` of the run's artifacts."""
        path, target = Path(path), self.artifacts / folder
        target.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target / path.name)

    def add_dataset(self, dataset: Mapping[str, str]) -> None:
        """Adds a data set (the fields of mlflow's `Dataset`, and `context`) unless it is there."""
        head = self.head
        if dict(dataset) not in head["datasets"]:
            self.update(datasets=[*head["datasets"], dict(dataset)])


def metric_rows(metrics: Mapping[str, float], step: int) -> list[MetricRow]:
    """`metrics` as rows with the present time."""
    timestamp = now()
    return [{"key": key, "value": float(value), "step": step, "timestamp": timestamp} for key, value in metrics.items()]


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
