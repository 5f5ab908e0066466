"""Two DVC experiments at once (`dvc exp run --run-all -j 2`) end like single ones (`make test-infra`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.project import Project

pytestmark = [pytest.mark.infra, pytest.mark.timeout(2400)]


def test_two_experiments_at_once_end_as_alone(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for seed in (1, 2):
        project.run(
            f"dvc exp run --queue --name at-once-{seed} "
            f"-S recipe=smoke -S training.workers=1 -S seed={seed} register"
        )
    project.run("dvc exp run --run-all -j 2")
    statuses = project.run("dvc queue status").stdout
    assert statuses.count("Success") == 2, statuses
    project.run(
        "dvc exp run --temp --force --name alone -S recipe=smoke -S training.workers=1 -S seed=1 register"
    )

    def models(experiment: str) -> dict[str, str]:
        """Returns the digest of each model of an experiment."""
        (ref,) = project.run(
            f"git for-each-ref --format='%(refname)' 'refs/exps/**/{experiment}'"
        ).stdout.split()
        lock = yaml.safe_load(project.run(f"git show {ref}:dvc.lock").stdout)
        outs = [out for stage in lock["stages"].values() for out in stage["outs"]]
        return {out["path"]: out["md5"] for out in outs if out["path"].startswith("models/")}

    assert models("at-once-1") == models("alone") != models("at-once-2")
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    versions = client.search_model_versions("name = 'bcos-smoke'")
    assert sorted(version.tags["dvc.experiment"] for version in versions) == ["at-once-1", "at-once-2"]
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    trained = {run.info.run_id: run.data.tags.get("dvc.experiment") for run in runs}
    assert {trained[version.tags["training.run"]] for version in versions} <= {
        "at-once-1",
        "at-once-2",
        "alone",
    }
