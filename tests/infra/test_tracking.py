"""MLflow on a PostgreSQL that is away for a while. `make test-infra` runs it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import tracking
from pipelines.training import Job, train
from tests.support import servers, toy

pytestmark = [pytest.mark.infra, pytest.mark.timeout(600)]
OUTAGE = 20.0  # seconds
BEFORE, MEANWHILE, EPOCHS = 2, 4, 6  # epochs done when the database goes, when training waits for it, at the end


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Postgres]:
    """What MLflow's server, the one of the environment, keeps its runs in."""
    if not servers.POSTGRES:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    monkeypatch.chdir(tmp_path)
    with (
        servers.Postgres(os.environ, tmp_path) as postgres,
        servers.mlflow_server(postgres.url, str(tmp_path / "artifacts"), os.environ, tmp_path) as mlflow,
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        yield postgres


def test_an_outage_of_the_database_neither_loses_nor_doubles_a_metric(
    database: servers.Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    back = threading.Event()
    logged_meanwhile: list[bool] = []  # whether training got through the epochs of the outage before that was over

    def return_() -> None:
        database.start()
        back.set()

    def batches(job: Job, split: str, *, epoch: int = 0, **place: Any) -> Any:
        if split == "train" and epoch == BEFORE:
            database.stop()
            threading.Timer(OUTAGE, return_).start()
        if split == "train" and epoch == MEANWHILE:
            logged_meanwhile.append(not back.is_set())
            assert back.wait(OUTAGE + servers.START)
            assert steps(run.run_id, "val/accuracy") == list(range(1, BEFORE + 1))
        return toy.toy_batches(job, split, epoch=epoch, **place)

    def steps(run_id: str | None, key: str) -> list[int]:
        return [item.step for item in MlflowClient().get_metric_history(run_id, key)]

    directory = tmp_path / "runs/toy/0123"
    with tracking.stage_run("toy", experiment="outage", params={}, directory=directory) as run:
        job = toy.toy_job(directory, epochs=EPOCHS, on_epoch=run.epoch_logger(), report_key=run.key)
        result = train(replace(job, batches=batches))
        run.history(result.history)

    assert logged_meanwhile == [True]
    assert capsys.readouterr().err.count("nothing is lost") == 1
    client = MlflowClient()
    experiment = client.get_experiment_by_name("outage")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics.keys() == result.history[0]["metrics"].keys()
    for key in logged.data.metrics:
        there = [(item.step, item.value) for item in client.get_metric_history(logged.info.run_id, key)]
        assert there == [(record["epoch"], record["metrics"][key]) for record in result.history]
