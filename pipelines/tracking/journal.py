"""The journal of a stage's tracked run on disk, written before and without any server."""

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


UNREADABLE_TAG = "journal.unreadable_lines"  # tells how many lines of the metrics were skipped
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
    """One execution of a stage in `<directory>/tracking/`.

    The folder has `run.json`, `metrics.jsonl`, `sent.json` (which lines of the metrics the server has) and a tree of `artifacts`.
    Nothing is held in memory: any process may read the folder, which changes nothing in it, and the one that tracks may append.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.root = self.directory / "tracking"
        self.artifacts = self.root / "artifacts"

    @property
    def exists(self) -> bool:
        """Whether an execution was tracked here, as far as it can be read."""
        return self._head() is not None

    def begin(
        self,
        stage: str,
        experiment: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        key: str | None = None,
    ) -> None:
        """Opens the journal of the unfinished execution found here, which then goes on, or of a new one.

        The params of one that goes on stay those it started with; its tags become `tags`. `key` names one that began elsewhere.
        A head that a crash has left unreadable counts as none: the stage that runs again makes all of it again.
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
        """Everything but metrics and artifacts; raises `DamagedFileError` if there is none that can be read."""
        head = self._head()
        if head is None:
            raise DamagedFileError(f"{self.root / 'run.json'}: missing or unreadable: run the stage again")
        return head

    def _head(self) -> dict[str, Any] | None:
        head = files.read_record(self.root / "run.json", dict)
        return head if head and head.keys() >= _KEYS else None

    def update(self, **values: Any) -> None:
        """Replaces values of the head."""
        files.write_json(self.root / "run.json", {**self.head, **values})

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> int:
        """Appends metrics that are not there yet, and returns their number: a metric keeps its first value per step."""
        known = {(row["key"], row["step"]) for row in self.metrics()}
        rows = [row for row in metric_rows(metrics, step) if (row["key"], row["step"]) not in known]
        if rows:
            self._append("".join(json.dumps(row) + "\n" for row in rows).encode())
        return len(rows)

    def _append(self, lines: bytes) -> None:
        """Appends to the metrics and syncs them to the disk; a line before that a kill has cut is ended, so that it cuts none."""
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
        """All metrics in their order, from line `start` of the file on; lines that cannot be read are left out."""
        return [row for row in self._lines()[start:] if row is not None]

    def _lines(self) -> list[MetricRow | None]:
        """The lines of the metrics, None for one that cannot be read."""
        path = self.root / "metrics.jsonl"
        return [_row(line) for line in path.read_bytes().splitlines()] if path.is_file() else []

    @property
    def line_count(self) -> int:
        """Lines of the metrics, readable or not."""
        return len(self._lines())

    def sent(self, run_id: str) -> int | None:
        """How many lines of the metrics MLflow's run has; None if that is not known."""
        note = files.read_record(self.root / "sent.json", dict) or {}
        return note.get("lines") if note.get("run_id") == run_id else None

    def note_sent(self, run_id: str, lines: int) -> None:
        """Notes that MLflow's run has so many lines of the metrics."""
        files.write_json(self.root / "sent.json", {"run_id": run_id, "lines": lines})

    def forget_sent(self) -> None:
        """Notes that it is not known which metrics the server has."""
        files.remove(self.root / "sent.json")

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


def _row(line: bytes) -> MetricRow | None:
    """The metric in a line; None if it has none."""
    try:
        row: MetricRow = json.loads(line)
        return row if isinstance(row, dict) and row.keys() == MetricRow.__required_keys__ else None
    except ValueError:
        return None


def metric_rows(metrics: Mapping[str, float], step: int) -> list[MetricRow]:
    """`metrics` as rows with the present time."""
    timestamp = now()
    return [
        {"key": key, "value": float(value), "step": step, "timestamp": timestamp}
        for key, value in metrics.items()
    ]


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
