"""Brings an MLflow run up to date with a journal. Idempotent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.tracking.journal import Journal, MetricRow
from pipelines.tracking.server import connect, experiment_id, uploading

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")
KEY = re.compile(r"[\w-]+")  # valid keys of a journal, which are pasted into MLflow's filters
KEY_TAG = "journal"  # tag of a run: the key of its journal, by which the run is found again
PARENT_TAG = "journal.parent"  # tag of a child's journal: the key of its parent's journal


def sync(journal: Journal, uri: str) -> Run:
    """Logs all of `journal` to its run on the server at `uri`, created if needed; returns the run.

    Raises:
        Exception: any error of the server or the connection. The journal loses nothing.
    """
    client = connect(uri)
    head = journal.head
    run = find_or_create_run(client, uri, head)
    run_id = run.info.run_id
    if journal.sent(run_id) is None and not run.data.metrics:
        journal.note_sent(run_id, 0)
    log_params_and_tags(client, run, head["params"], head["tags"] | parent_tag(client, run, head["tags"]))
    log_metrics(client, run_id, journal)
    for dataset in head["datasets"]:
        log_dataset(client, run_id, dataset)
    if journal.artifacts.is_dir():
        with uploading():
            client.log_artifacts(run_id, str(journal.artifacts))
    if head["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, head["status"], head["ended"])
    return run


def find_or_create_run(client: MlflowClient, uri: str, head: Mapping[str, Any]) -> Run:
    """Returns the run of the journal with this `head`, which it creates if needed.

    Raises `ValueError` if the key of the journal is not a valid one.
    """
    if not KEY.fullmatch(head["key"]):
        raise ValueError(f"the key {head['key']!r} of a run has more than letters, digits, _ and -")
    experiment = experiment_id(client, uri, head["experiment"])
    found = client.search_runs([experiment], f"tags.{KEY_TAG} = '{head['key']}'", max_results=1)
    if found:
        return found[0]
    tags = {KEY_TAG: head["key"], "mlflow.source.name": head["stage"], **head["tags"]}
    return client.create_run(experiment, start_time=head["started"], tags=tags, run_name=head["stage"])


def parent_tag(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> dict[str, str]:
    """Returns the tag by which MLflow shows `run` as a child; empty until the parent's run is logged.

    `tags` are those of the journal, which name the parent's journal.
    """
    if PARENT_TAG not in tags:
        return {}
    found = client.search_runs(
        [run.info.experiment_id], f"tags.{KEY_TAG} = '{tags[PARENT_TAG]}'", max_results=1
    )
    return {"mlflow.parentRunId": found[0].info.run_id} if found else {}


def log_params_and_tags(
    client: MlflowClient, run: Run, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Logs the params that the run does not have (MLflow never changes one) and the tags that differ."""
    from mlflow.entities import Param, RunTag

    missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    for some in chunks(missing, 100):
        client.log_batch(run.info.run_id, params=some)
    differing = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    for some_tags in chunks(differing, 100):
        client.log_batch(run.info.run_id, tags=some_tags)


def log_metrics(client: MlflowClient, run_id: str, journal: Journal) -> None:
    """Logs the metrics of the journal that the run does not have.

    The journal records which metrics the run has. If it does not, the server is asked. That happens if the
    journal is younger than the run, because its machine was lost, or if another machine has logged too. A
    request whose answer is lost can be repeated, because MLflow drops equal rows.
    """
    lines, sent = journal.line_count, journal.sent(run_id)
    rows = journal.metrics(sent or 0)
    if sent is None:
        logged = {
            (key, item.step)
            for key in {row["key"] for row in rows}
            for item in client.get_metric_history(run_id, key)
        }
        rows = [row for row in rows if (row["key"], row["step"]) not in logged]
    log_rows(client, run_id, rows)
    if lines != sent:
        journal.note_sent(run_id, lines)


def log_rows(client: MlflowClient, run_id: str, rows: Sequence[MetricRow]) -> None:
    """Logs the rows, at most 1000 per request."""
    from mlflow.entities import Metric

    for some in chunks([Metric(**row) for row in rows], 1000):
        client.log_batch(run_id, metrics=some)


def log_dataset(client: MlflowClient, run_id: str, dataset: Mapping[str, str]) -> None:
    """Records a data set (see `describe_dataset`) as an input of the run.

    MLflow keeps one entry per name and digest, so repeating it changes nothing.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = {key: value for key, value in dataset.items() if key != "context"}
    tags = [InputTag("mlflow.data.context", dataset["context"])]
    client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**fields), tags)])


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Splits `items` into pieces of at most `size`, because MLflow refuses longer requests."""
    return (items[start : start + size] for start in range(0, len(items), size))
