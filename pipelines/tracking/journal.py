"""The journal of a stage's tracked run: files on disk, written before any server is asked.

<directory>/tracking/run.json        the head: key, stage, status, params, tags, data sets, ...
<directory>/tracking/metrics.jsonl   one `MetricRow` per line
<directory>/tracking/sent.json       the MLflow run, and how many lines of the metrics it has
<directory>/tracking/artifacts/      files to upload
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pipelines.storage import files
from pipelines.storage.errors import DamagedFileError


class MetricRow(TypedDict):
    """One value of one metric; `timestamp` in milliseconds."""

    key: str
    value: float
    step: int
    timestamp: int


UNREADABLE_TAG = "journal.unreadable_lines"  # tag: number of lines of the metrics that were skipped
_KEYS = {
    "key",
    "stage",
    "experiment",
    "started",
    "ended",
    "status",
    "logged",
    "warned",
    "params",
    "tags",
    "datasets",
}


class Journal:
    """One execution of a stage, recorded in `<directory>/tracking/`.

    The object holds no state in memory. Any process may read the folder; only the process that tracks the run
    may write.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.root = self.directory / "tracking"
        self.artifacts = self.root / "artifacts"

    @property
    def exists(self) -> bool:
        """True if the folder has a readable record of an execution."""
        return self._head() is not None

    def begin(
        self,
        stage: str,
        experiment: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        key: str | None = None,
    ) -> None:
        """Opens the journal: continues the unfinished execution found here, or starts a new one.

        An execution that continues keeps its params and its key, and gets `tags` beside its own. A new one
        gets `key`, which names an execution that began on another machine, or a random key. If a crash left
        `run.json` unreadable, the journal starts anew, because the stage that runs again logs everything
        again.
        """
        head = self._head()
        if head is not None and head["status"] != "FINISHED":
            bad = self._lines().count(None)
            counted = {UNREADABLE_TAG: str(bad)} if bad else {}
            if bad:
                place = os.path.relpath(self.root / "metrics.jsonl")
                print(f"{place}: {bad} unreadable line(s), as a crash leaves them, skipped", file=sys.stderr)
            self.update(status="RUNNING", tags={**head["tags"], **tags, **counted}, warned=False, ended=None)
            return
        if self.root.exists():
            shutil.rmtree(self.root)
        head = {
            "key": key or secrets.token_hex(8),
            "stage": stage,
            "experiment": experiment,
            "started": now(),
            "ended": None,
        }
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
        """Content of `run.json`. Raises `DamagedFileError` if the file is missing or unreadable."""
        head = self._head()
        if head is None:
            raise DamagedFileError(f"{self.root / 'run.json'}: missing or unreadable: run the stage again")
        return head

    def _head(self) -> dict[str, Any] | None:
        head = files.read_record(self.root / "run.json", dict)
        return head if head and head.keys() >= _KEYS else None

    def update(self, **values: Any) -> None:
        """Replaces values in `run.json`."""
        files.write_json(self.root / "run.json", {**self.head, **values})

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> int:
        """Appends metrics that are not there yet, because a metric keeps its first value per step.

        Returns how many it has appended.
        """
        known = {(row["key"], row["step"]) for row in self.metrics()}
        rows = [row for row in metric_rows(metrics, step) if (row["key"], row["step"]) not in known]
        if rows:
            self._append("".join(json.dumps(row) + "\n" for row in rows).encode())
        return len(rows)

    def _append(self, lines: bytes) -> None:
        """Appends to `metrics.jsonl` and syncs it to disk.

        If a kill has cut the last line short, that line is ended first, so that the new ones stay readable.
        """
        path = self.root / "metrics.jsonl"
        with open(path, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    lines = b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        files.sync_folder(self.root)

    def metrics(self, start: int = 0) -> list[MetricRow]:
        """Returns the readable metrics from line `start` of the file on, in their order."""
        return [row for row in self._lines()[start:] if row is not None]

    def _lines(self) -> list[MetricRow | None]:
        """Returns the lines of `metrics.jsonl`, `None` for an unreadable one."""
        path = self.root / "metrics.jsonl"
        return [_row(line) for line in path.read_bytes().splitlines()] if path.is_file() else []

    @property
    def line_count(self) -> int:
        """Number of lines in `metrics.jsonl`, readable or not."""
        return len(self._lines())

    def sent(self, run_id: str) -> int | None:
        """Returns how many lines of the metrics the MLflow run has, `None` if that is unknown."""
        note = files.read_record(self.root / "sent.json", dict) or {}
        return note.get("lines") if note.get("run_id") == run_id else None

    def note_sent(self, run_id: str, lines: int) -> None:
        """Records that the MLflow run has the first `lines` lines of the metrics."""
        files.write_json(self.root / "sent.json", {"run_id": run_id, "lines": lines})

    def forget_sent(self) -> None:
        """Records that it is unknown which metrics the server has."""
        files.remove(self.root / "sent.json")

    def add_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copies a file or a folder to `folder` of the run's artifacts."""
        path, target = Path(path), self.artifacts / folder
        target.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target / path.name)

    def add_dataset(self, dataset: Mapping[str, str]) -> None:
        """Adds a data set (the fields of MLflow's `Dataset`, and `context`) unless it is recorded already."""
        head = self.head
        if dict(dataset) not in head["datasets"]:
            self.update(datasets=[*head["datasets"], dict(dataset)])


def _row(line: bytes) -> MetricRow | None:
    """Returns the metric in a line, `None` if the line is not one."""
    try:
        row: MetricRow = json.loads(line)
        return row if isinstance(row, dict) and row.keys() == MetricRow.__required_keys__ else None
    except ValueError:
        return None


def metric_rows(metrics: Mapping[str, float], step: int) -> list[MetricRow]:
    """Returns `metrics` as rows with the present time."""
    timestamp = now()
    return [
        {"key": key, "value": float(value), "step": step, "timestamp": timestamp}
        for key, value in metrics.items()
    ]


def now() -> int:
    """Returns the time in milliseconds since 1970 (UTC)."""
    return int(time.time() * 1000)
