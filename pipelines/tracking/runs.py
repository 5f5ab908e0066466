"""One MLflow run a stage execution. The journal on disk is the truth; the server is brought to it when it answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from pipelines.errors import redacted
from pipelines.storage.paths import project_root
from pipelines.tracking.journal import Journal, metric_rows, now
from pipelines.tracking.provenance import (
    DIGEST,
    content_digest,
    experiment_tags,
    git_tags,
    input_hashes,
    lock_hash,
    model_files,
    version_tags,
)
from pipelines.tracking.server import complaint, connect, tracking_uri, where_to_look
from pipelines.tracking.sync import KEY, PARENT_TAG, log_metrics, log_rows, sync

LONGEST_VALUE = 6000  # characters of a param, MLflow's limit
LONGEST_DIGEST = 36  # characters of a data set's digest, MLflow's limit
LEAST_REST = 10.0  # seconds that a server which did not answer is left alone
TRIALS = "trials"  # where in a run's directory the journals of its children are


@contextmanager
def stage_run(
    stage: str,
    *,
    experiment: str,
    params: Mapping[str, Any],
    directory: str | Path,
    inputs: Mapping[str, str] | None = None,
    key: str | None = None,
    taken_over: Callable[[], bool] = lambda: False,
) -> Iterator[StageRun]:
    """Tracks one execution of a stage. An unfinished one found in `directory` (the stage was killed) goes on as the same run.

    A tracking server that does not answer, at the start or later, costs seconds and one line that says how to log the run
    later; nothing of it raises.

    Args:
        stage: its name, which the run gets.
        experiment: MLflow's experiment.
        params: nested values; keys are joined with dots.
        directory: the persistent folder of this stage and its inputs (`runs/<stage>/<hash>`); where it is a URL, the folder
            with the same end here.
        inputs: name -> path (or identifying text) of each input, for `lock_hash`.
        key: `StageRun.key` of an unfinished execution whose journal is lost with its machine: it goes on as the same run.
        taken_over: asked where the block raises: whether another process goes on with this run.

    Yields:
        The run. It ends FINISHED, or FAILED where the block raises and no other process goes on with it.
    """
    run = StageRun.begin(stage, experiment, params, directory, inputs or {}, key)
    try:
        yield run
    except BaseException:
        if not taken_over():
            run.end("FAILED")
        raise
    run.end("FINISHED")


def child_run(
    parent: StageRun,
    name: str,
    *,
    experiment: str,
    params: Mapping[str, Any],
    directory: str | Path,
    history: Iterable[Mapping[str, Any]],
    metrics: Mapping[str, float],
    status: str,
) -> None:
    """Logs work that is over, such as a trial of a search, as a child of `parent`; done again, it changes nothing.

    Args:
        parent: the run of the whole.
        name: of the child.
        experiment: MLflow's experiment, that of `parent`.
        params: nested values.
        directory: the persistent folder of this work alone; its last part names the journal among those of `parent`.
        history: records of epochs, see `StageRun.history`.
        metrics: further figures, logged at the last epoch.
        status: FINISHED, FAILED or KILLED.
    """
    journal, records = Journal(parent.directory / TRIALS / Path(directory).name), list(history)
    if not journal.exists or journal.head["status"] != status:
        tags = {"stage": name, PARENT_TAG: parent.key, **version_tags()}
        journal.begin(name, experiment, flatten(params), tags, key=f"{parent.key}-{journal.directory.name}")
        for record in records:
            journal.add_metrics(record["metrics"], record["epoch"])
        journal.add_metrics(metrics, records[-1]["epoch"] if records else 0)
        journal.update(
            status=status, ended=now(), warned=parent.run_id is None
        )  # one line on a dead server is enough
    if parent.run_id is not None and not journal.head["logged"]:
        log(journal, tracking_uri(), announce=False)


class StageRun:
    """A stage's run: everything logged is on disk before a server is asked."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self._journal = journal
        self._uri = uri
        self.run_id: str | None = None
        """MLflow's id; None while the server does not answer."""
        self.key: str = journal.head["key"]
        """Names this execution, with or without a server; another for every run."""

    @classmethod
    def begin(
        cls,
        stage: str,
        experiment: str,
        params: Mapping[str, Any],
        directory: str | Path,
        inputs: Mapping[str, str],
        key: str | None = None,
    ) -> StageRun:
        """Opens the journal and, where the server answers, the run."""
        journal, uri = Journal(_local(directory)), tracking_uri()
        if journal.exists and journal.head["status"] == "FINISHED" and not journal.head["logged"]:
            log(
                journal, uri
            )  # a finished execution that no server has yet: try before a new one takes its place
            if not journal.head["logged"]:
                journal.update(
                    status="FAILED"
                )  # not finished until it is logged: the new execution goes on with it
        tags = {
            "stage": stage,
            **version_tags(),
            **git_tags(),
            **experiment_tags(),
            "dvc.inputs": lock_hash(inputs),
        }
        tags |= {f"dvc.input.{name}": redacted(value) for name, value in input_hashes(inputs).items()}
        known = (
            key if isinstance(key, str) and KEY.fullmatch(key) else None
        )  # it may come from a storage that others write to
        journal.begin(stage, experiment, flatten(params), tags, known)
        run = cls(journal, uri)
        run.run_id = log(journal, uri)
        return run

    @property
    def directory(self) -> Path:
        """Where the journal lies; `python -m pipelines.tracking.relog` takes it."""
        return self._journal.directory

    def tag(self, key: str, value: str) -> None:
        """Sets a tag, which the server gets when the stage ends."""
        self._journal.update(tags={**self._journal.head["tags"], key: redacted(value)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs `values` (names like `val/accuracy`) at `step`. A metric keeps the first value it has at a step."""
        self._journal.add_metrics(values, step)
        if self.run_id is not None and not self._journal.head["warned"]:
            with _warning(self._journal, self._uri):
                log_metrics(connect(self._uri), self.run_id, self._journal)

    def history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Completes the per-epoch metrics from a training's history (`Result.history`); what is there already stays."""
        missing = sum([self._journal.add_metrics(record["metrics"], record["epoch"]) for record in records])
        if missing:  # a worker on another machine may have logged them
            self._journal.forget_sent()

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Keeps a copy of a file or folder; uploaded to `folder` of the run's artifacts when the stage ends."""
        self._journal.add_artifact(path, folder)

    def pictures(self, paths: Iterable[str | Path]) -> None:
        """`artifact` to `pictures`, for each path."""
        for path in paths:
            self.artifact(path, "pictures")

    def model(self, directory: str | Path) -> None:
        """Keeps a model's files as artifacts in `model`, and tags the run with their digest, by which `register` finds it."""
        for path in model_files(directory):
            self.artifact(path, "model")
        self.tag(DIGEST, content_digest(model_files(directory)))

    def dataset(self, manifest: Mapping[str, Any], *, name: str, context: str) -> None:
        """Makes the data set of a shard `manifest` an input of the run; `context` says what for."""
        self._journal.add_dataset(describe_dataset(manifest, name=name, context=context))

    def epoch_logger(self) -> EpochLogger:
        """For `Job.on_epoch`."""
        return EpochLogger(self._uri, self.run_id, str(self.directory))

    def end(self, status: str) -> None:
        """Closes the journal and logs all of it, and what of its children is not logged. `status` is FINISHED or FAILED."""
        self._journal.update(status=status, ended=now())
        if log(self._journal, self._uri, announce=False) is not None:
            for child in children(self.directory):
                if not child.head["logged"]:
                    log(child, self._uri, announce=False)


@dataclass
class EpochLogger:
    """Logs epochs from the worker process that trains; picklable, and never raises for a server's sake.

    A server that does not answer costs no more than a tenth of the time; once it answers it gets what it missed.
    On a machine that does not see `directory` it logs to the server alone; `StageRun.history` completes what it missed.

    Attributes:
        uri: the tracking server, absolute.
        run_id: MLflow's id of the run; None where there was no server at the start: then the journal alone is written.
        directory: the folder of the journal, absolute.
    """

    uri: str
    run_id: str | None
    directory: str
    _ask_at: float = field(default=0.0, init=False)  # on this process's clock; not before

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Logs `record["metrics"]` at step `record["epoch"]`; a record that was logged before changes nothing."""
        journal = Journal(self.directory)
        if here := journal.exists:
            journal.add_metrics(record["metrics"], record["epoch"])
        began = monotonic()
        if self.run_id is None or began < self._ask_at:
            return
        answered = False
        with _warning(journal, self.uri):
            if here:
                log_metrics(connect(self.uri), self.run_id, journal)
            else:
                log_rows(connect(self.uri), self.run_id, metric_rows(record["metrics"], record["epoch"]))
            answered = True
        if not answered:
            ended = monotonic()
            self._ask_at = ended + max(LEAST_REST, 10 * (ended - began))


def log(journal: Journal, uri: str, announce: bool = True) -> str | None:
    """Brings the server to `journal` and returns the run's id; None, and one line, where it does not answer.

    Args:
        journal: with its `run.json`.
        uri: of the server, absolute.
        announce: print where the run is to be seen.
    """
    with _warning(journal, uri):
        run = sync(journal, uri)
        finished = journal.head["status"] in ("FINISHED", "KILLED")
        journal.update(run_id=run.info.run_id, tracking_uri=redacted(uri), logged=finished)
        if announce:
            look = where_to_look(uri, run.info.experiment_id, run.info.run_id)
            print(f"MLflow run {journal.head['stage']} {run.info.run_id}: {look}")
        return run.info.run_id
    return None


def children(directory: str | Path) -> list[Journal]:
    """The journals of the children of the run whose folder this is."""
    return [
        journal for path in sorted(Path(directory, TRIALS).glob("*")) if (journal := Journal(path)).exists
    ]


@contextmanager
def _warning(journal: Journal, uri: str) -> Iterator[None]:
    """Turns whatever a server raises into one line, said once an execution."""
    try:
        yield
    except Exception as error:  # a tracking server must never end a training, whatever is wrong with it
        if journal.exists and journal.head["warned"]:
            return
        if journal.exists:
            journal.update(warned=True)
        shown_directory = os.path.relpath(journal.directory, project_root())
        print(
            f"MLflow at {redacted(uri)} {complaint(error)}; nothing is lost, the run is kept in {shown_directory}: "
            f"log it later with `python -m pipelines.tracking.relog {shown_directory}`",
            file=sys.stderr,
        )


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested `params` as MLflow takes them: dotted keys, redacted text (lists as JSON), cut at its limit."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = redacted(
                json.dumps(value, default=str) if isinstance(value, list | tuple | Mapping) else str(value)
            )
            flat[f"{prefix}{key}"] = text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
    return flat


def describe_dataset(manifest: Mapping[str, Any], *, name: str, context: str) -> dict[str, str]:
    """A shard manifest as the fields of an mlflow `Dataset`, and its `context`. The digest is the head of the checksum."""
    splits = manifest["splits"]
    samples = {split: sum(shard["count"] for shard in shards) for split, shards in splits.items()}
    profile = {"samples": samples, "shards": {split: len(shards) for split, shards in splits.items()}}
    return {
        "name": name,
        "digest": manifest["checksum"][:LONGEST_DIGEST],
        "source_type": "shards",
        "source": json.dumps({"source": redacted(manifest["source"]), "sha256": manifest["checksum"]}),
        "schema": json.dumps({"task": manifest["task"], "classes": list(manifest["classes"])}),
        "profile": json.dumps({**profile, "classes": len(manifest["classes"])}),
        "context": context,
    }


def _local(directory: str | Path) -> Path:
    """The folder of the journal: `directory`, or `runs/<stage>/<hash>` in the project's folder if that is at a URL.

    An experiment that DVC runs in a copy of the project has a journal of its own there, for DVC deletes the copy at its end.
    """
    text, root = str(directory), project_root()
    copy = os.environ.get("DVC_EXP_NAME", "copy") if Path.cwd() != root else None
    if "://" not in text and copy is None:
        return Path(text).absolute()
    return root / "runs" / "-".join(filter(None, ("/".join(text.rstrip("/").split("/")[-2:]), copy)))
