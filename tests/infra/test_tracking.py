"""MLflow with an outage of PostgreSQL, with three writers, in a bare environment (`make test-infra`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import tracking
from pipelines.bcos import add_inverse
from pipelines.models import ModelSpec, assemble, save
from pipelines.training import Job, train
from tests.support import servers, toy

pytestmark = [pytest.mark.infra, pytest.mark.timeout(600)]
OUTAGE = 20.0  # seconds
# Epochs done when the database goes down, when training waits for it, and at the end.
BEFORE, MEANWHILE, EPOCHS = 2, 4, 6


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Postgres]:
    """The database of MLflow's server, whose address is in the environment."""
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
    # Whether training finished the epochs of the outage before it was over.
    logged_meanwhile: list[bool] = []

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


MANIFEST = {
    "classes": ["cat", "dog", "owl"],
    "task": "multiclass",
    "source": "scenes",
    "checksum": "ab" * 32,
    "splits": {"test": []},
}


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A B-cos network, version 1 of `demo` in an SQLite registry in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    torch.manual_seed(0)
    spec = ModelSpec("resnet20", ("cat", "dog", "owl"), 16, "bcos")
    module = assemble(spec)
    for parameter in module.parameters():  # large enough that no logit vanishes
        torch.nn.init.normal_(parameter, std=0.3)
    save("model", module, spec)
    tracking.register(
        "model", experiment="demo", name="demo", metrics={}, manifest=MANIFEST, dataset="scenes"
    )
    return module.eval()


PYENV = f"""#!/bin/sh
# `pyenv install --skip-existing VERSION`, which MLflow calls, takes this machine's Python and builds none
for version; do :; done
mkdir -p "$PYENV_ROOT/versions" && ln -sfn {sys.base_prefix} "$PYENV_ROOT/versions/$version"
"""


@pytest.mark.timeout(3000)
def test_the_registered_version_scores_in_a_virtual_environment_of_its_own_requirements(
    registered: torch.nn.Module, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    (tmp_path / "images.json").write_text(
        json.dumps({"inputs": images.tolist(), "params": {"explain": True, "targets": [2, 0]}})
    )
    pyenv = tmp_path / "bin/pyenv"
    pyenv.parent.mkdir()
    pyenv.write_text(PYENV)
    pyenv.chmod(0o755)
    own = {"PATH": f"{pyenv.parent}:{os.environ['PATH']}", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    } | own
    command = ["models", "predict", "--model-uri", "models:/demo/1", "--env-manager", "virtualenv"]
    files = ["--input-path", "images.json", "--content-type", "json", "--output-path", "scores.json"]
    elsewhere = [sys.executable, "-m", "mlflow", *command, *files]
    done = subprocess.run(
        elsewhere, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    scores = json.loads((tmp_path / "scores.json").read_text())["predictions"]
    with torch.no_grad():
        logits = registered(add_inverse(torch.from_numpy(images)))
    assert torch.allclose(torch.tensor(scores["logits"]), logits, rtol=1e-4, atol=1e-5)
    assert np.shape(scores["contributions"]) == (2, 16, 16)


WRITER = """
import sys, time
from pathlib import Path
from pipelines import tracking
name, ready = sys.argv[1], Path("ready")
(ready / name).touch()
while len(list(ready.iterdir())) < 3:  # all begin at once
    time.sleep(0.01)
manifest = {"classes": ["cat"], "task": "multiclass", "source": "scenes", "checksum": "ab" * 32}
manifest["splits"] = {"test": []}
directory = f"runs/pretrain/{name}"
with tracking.stage_run("pretrain", experiment="demo", params={"name": name}, directory=directory) as run:
    log = run.epoch_logger()
    for epoch in range(1, 11):
        log({"epoch": epoch, "metrics": {"val/accuracy": epoch / 10}})
    run.model("model")
tracking.register("model", experiment="demo", name="demo", metrics={}, manifest=manifest, dataset="scenes")
"""


def test_processes_that_track_and_register_at_once_in_a_new_database_end_as_one_alone(
    registered: torch.nn.Module, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    project = tmp_path / "project"
    shutil.copytree(tmp_path / "model", project / "model")
    (project / "ready").mkdir()
    environment = os.environ | {"MLFLOW_TRACKING_URI": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name],
            cwd=project,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    for writer in writers:
        _, told = writer.communicate()
        assert writer.returncode == 0, told
        assert "Traceback" not in told
        assert "nothing is lost" not in told
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    runs = client.search_runs(
        [client.get_experiment_by_name("demo").experiment_id], "tags.stage = 'pretrain'"
    )
    assert {run.data.params["name"]: run.info.status for run in runs} == dict.fromkeys("abc", "FINISHED")
    for run in runs:
        assert [item.step for item in client.get_metric_history(run.info.run_id, "val/accuracy")] == list(
            range(1, 11)
        )
    assert [str(version.version) for version in client.search_model_versions("name = 'demo'")] == ["1"]
