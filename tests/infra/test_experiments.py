"""Experiments of DVC at once on this machine (`dvc exp run --run-all -j 2`) end as alone. `make test-infra` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dvc.api
import pytest
from mlflow import MlflowClient

from tests.support.project import Project

pytestmark = [pytest.mark.infra, pytest.mark.timeout(2400)]


def test_two_experiments_at_once_end_as_alone(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for seed in (1, 2):
        project.run(f"dvc exp run --queue --name at-once-{seed} -S recipe=smoke -S training.workers=1 -S seed={seed} register")
    project.run("dvc exp run --run-all -j 2")
    statuses = project.run("dvc queue status").stdout
    assert statuses.count("Success") == 2, statuses
    project.run("dvc exp run --temp --force --name alone -S recipe=smoke -S training.workers=1 -S seed=1 register")

    def metrics(experiment: str) -> dict[str, Any]:
        found = dvc.api.metrics_show(repo=str(project.folder), rev=experiment)
        return {name: value for name, value in found.items() if "images_per_second" not in name}

    assert metrics("at-once-1") == metrics("alone") != metrics("at-once-2")
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    versions = client.search_model_versions("name = 'bcos-smoke'")
    assert sorted(version.tags["dvc.experiment"] for version in versions) == ["at-once-1", "at-once-2"]
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    trained = {run.info.run_id: run.data.tags.get("dvc.experiment") for run in runs}
    assert {trained[version.tags["training.run"]] for version in versions} <= {"at-once-1", "at-once-2", "alone"}
