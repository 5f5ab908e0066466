"""One MLflow run per stage execution.

The journal on disk is the truth. The server is brought up to date with it whenever the server answers.
"""

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
LEAST_REST = 10.0  # minimum of seconds before a server that did not answer is asked again
TRIALS = "trials"  # folder in a run's directory, with the journals of its child runs


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
    """Tracks one execution of a stage.

    If `directory` has an unfinished execution, because the stage was killed or failed, its run is continued.
    A tracking server that does not answer, at the start or later, costs seconds and one printed line that
    says how to log the run later. It raises nothing.

    Args:
        stage: name of the stage and of the run.
        experiment: MLflow experiment.
        params: nested values; their keys are joined with dots.
        directory: persistent folder of this stage and its inputs (`runs/<stage>/<hash>`). If it is a URL, the
            journal is in the local folder `runs/<stage>/<hash>`.
        inputs: name -> path (or identifying text) of each input, for `lock_hash`.
        key: `StageRun.key` of an unfinished execution whose journal was lost with its machine; its run is
            continued.
        taken_over: called if the block raises. Returns True if another process has taken this run over.

    Yields:
        The run. It ends as FINISHED, or as FAILED if the block raises and no other process has taken it over.
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
    """Logs completed work, such as a trial of a search, as a child run of `parent`. Idempotent.

    Args:
        parent: run of the stage.
        name: name of the child run.
        experiment: MLflow experiment, that of `parent`.
        params: nested values.
        directory: persistent folder of this work alone. The child's journal gets the name of its last part.
        history: records of epochs, as in `StageRun.history`.
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
        # If the server is dead, the parent has said so already.
        journal.update(status=status, ended=now(), warned=parent.run_id is None)
    if parent.run_id is not None and not journal.head["logged"]:
        log(journal, tracking_uri(), announce=False)


class StageRun:
    """The tracked run of a stage. Everything is on disk before it goes to a server."""

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
        """Opens the journal, and the run if the server answers."""
        journal, uri = Journal(_local(directory)), tracking_uri()
        if journal.exists and journal.head["status"] == "FINISHED" and not journal.head["logged"]:
            log(journal, uri)  # last chance for the finished execution before the new one replaces it
            if not journal.head["logged"]:
                # Unfinished until it is logged, so that the new execution continues it.
                journal.update(status="FAILED")
        tags = {
            "stage": stage,
            **version_tags(),
            **git_tags(),
            **experiment_tags(),
            "dvc.inputs": lock_hash(inputs),
        }
        tags |= {f"dvc.input.{name}": redacted(value) for name, value in input_hashes(inputs).items()}
        # The key may come from a storage that others can write to.
        known = key if isinstance(key, str) and KEY.fullmatch(key) else None
        journal.begin(stage, experiment, flatten(params), tags, known)
        run = cls(journal, uri)
        run.run_id = log(journal, uri)
        return run

    @property
    def directory(self) -> Path:
        """Folder of the journal, the argument of `python -m pipelines.tracking.relog`."""
        return self._journal.directory

    def tag(self, key: str, value: str) -> None:
        """Sets a tag. The server gets it when the stage ends."""
        self._journal.update(tags={**self._journal.head["tags"], key: redacted(value)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs `values` (names like `val/accuracy`) at `step`. A metric keeps its first value per step."""
        self._journal.add_metrics(values, step)
        if self.run_id is not None and not self._journal.head["warned"]:
            with _warning(self._journal, self._uri):
                log_metrics(connect(self._uri), self.run_id, self._journal)

    def history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds the metrics of a training's history (`Result.history`) that the journal does not have yet."""
        missing = sum([self._journal.add_metrics(record["metrics"], record["epoch"]) for record in records])
        if missing:  # a worker on another machine may have sent them to the server
            self._journal.forget_sent()

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Keeps a copy of a file or folder, which is uploaded to `folder` of the run when the stage ends."""
        self._journal.add_artifact(path, folder)

    def pictures(self, paths: Iterable[str | Path]) -> None:
        """Keeps each path as an artifact in `pictures`."""
        for path in paths:
            self.artifact(path, "pictures")

    def model(self, directory: str | Path) -> None:
        """Keeps a model's files as artifacts in `model`.

        Tags the run with the digest of these files, by which `register` finds it.
        """
        for path in model_files(directory):
            self.artifact(path, "model")
        self.tag(DIGEST, content_digest(model_files(directory)))

    def dataset(self, manifest: Mapping[str, Any], *, name: str, context: str) -> None:
        """Records the data set of a shard `manifest` as an input of the run; `context` names its purpose."""
        self._journal.add_dataset(describe_dataset(manifest, name=name, context=context))

    def epoch_logger(self) -> EpochLogger:
        """Returns a logger of epochs for `Job.on_epoch`."""
        return EpochLogger(self._uri, self.run_id, str(self.directory))

    def end(self, status: str) -> None:
        """Closes the journal and logs it, then the unlogged child runs. `status` is FINISHED or FAILED."""
        self._journal.update(status=status, ended=now())
        if log(self._journal, self._uri, announce=False) is not None:
            for child in children(self.directory):
                if not child.head["logged"]:
                    log(child, self._uri, announce=False)


@dataclass
class EpochLogger:
    """Logs epochs from the worker process that trains. Picklable; errors of a server never propagate.

    Waiting for a server that does not answer takes at most a tenth of the time. Once it answers, it gets the
    epochs that it missed. On a machine without access to `directory`, only the server gets the metrics.
    `StageRun.history` adds those that it missed.

    Attributes:
        uri: absolute address of the tracking server.
        run_id: MLflow's id of the run. `None` if no server answered at the start; then only the journal is
            written.
        directory: absolute path of the journal's folder.
    """

    uri: str
    run_id: str | None
    directory: str
    _ask_at: float = field(default=0.0, init=False)  # earliest `monotonic()` of the next request

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Logs `record["metrics"]` at step `record["epoch"]`; a record logged before changes nothing."""
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
    """Brings the server up to date with `journal`. Returns the run's id, `None` if the server fails.

    A failure prints one line, once per execution.

    Args:
        journal: an existing journal.
        uri: absolute address of the server.
        announce: print where to look at the run.
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
    """Returns the journals of the child runs of the run in `directory`."""
    return [
        journal for path in sorted(Path(directory, TRIALS).glob("*")) if (journal := Journal(path)).exists
    ]


@contextmanager
def _warning(journal: Journal, uri: str) -> Iterator[None]:
    """Turns any error of a server into one printed line, once per execution."""
    try:
        yield
    except Exception as error:  # no error of a tracking server, of whatever type, may end a training
        if journal.exists and journal.head["warned"]:
            return
        if journal.exists:
            journal.update(warned=True)
        shown_directory = os.path.relpath(journal.directory, project_root())
        print(
            f"MLflow at {redacted(uri)} {complaint(error)}; nothing is lost, "
            f"the run is kept in {shown_directory}: "
            f"log it later with `python -m pipelines.tracking.relog {shown_directory}`",
            file=sys.stderr,
        )


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested `params` for MLflow: dotted keys, redacted text (lists as JSON), cut at its limit."""
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
    """Returns a shard manifest as the fields of MLflow's `Dataset`, and its `context`.

    The digest is the start of the manifest's checksum.
    """
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
    """Returns the journal's folder: `directory`, or `runs/<stage>/<hash>` in the project if that is a URL.

    DVC runs some experiments in a copy of the project, and deletes the copy at the end. So the journal of
    such an experiment is in the project itself, in a folder of its own.
    """
    text, root = str(directory), project_root()
    copy = os.environ.get("DVC_EXP_NAME", "copy") if Path.cwd() != root else None
    if "://" not in text and copy is None:
        return Path(text).absolute()
    return root / "runs" / "-".join(filter(None, ("/".join(text.rstrip("/").split("/")[-2:]), copy)))
