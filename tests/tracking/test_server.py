"""Addresses of the tracking server in projects of any path, and the creation of one database."""

import os
import shlex
import shutil

import pytest

from pipelines.tracking import stage_run, where_to_look
from pipelines.tracking.server import absolute_uri, artifact_location, connect, tracking_uri


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:////project/mlflow.db"),
        ("sqlite:///deep/a.db?timeout=5", "sqlite:////project/deep/a.db?timeout=5"),
        ("sqlite:////else/a.db", "sqlite:////else/a.db"),
        ("sqlite:////else/100%25/a.db", "sqlite+pysqlite:////else/100%25/a.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("file:runs", "file:///project/runs"),
        ("file:my%20runs", "file:///project/my%20runs"),
        ("file:///else/runs", "file:///else/runs"),
        ("file:///else/my%20runs", "file:///else/my%20runs"),
        ("file://localhost/else/100%25", "file:///else/100%25"),
        ("./mlruns", "file:///project/mlruns"),
        ("./100% runs", "file:///project/100%25%20runs"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
    ],
)
def test_addresses_are_absolute(uri, expected, tmp_path):
    assert absolute_uri(uri, tmp_path) == expected.replace("/project", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["with space", "100%25 done", "100%", "what?now", "a#b", "größe", "it's", "a&b=c;d"]
)
def test_a_project_in_a_folder_of_any_name_has_its_database_and_artifacts_inside(
    name, tmp_path, monkeypatch, empty_database
):
    project = tmp_path / name
    project.mkdir()
    shutil.copy(empty_database, project / "mlflow.db")
    monkeypatch.chdir(project)
    for variable in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    (project / "picture.png").write_bytes(b"png")
    with stage_run("pretrain", experiment="demo", params={}, directory="runs/pretrain/0123") as run:
        run.pictures(["picture.png"])
    client = connect(tracking_uri())
    assert [item.path for item in client.list_artifacts(run.run_id, "pictures")] == ["pictures/picture.png"]
    assert client.get_experiment("0").artifact_location is not None
    assert (project / "mlartifacts" / run.run_id).is_dir()
    assert os.listdir(tmp_path) == [name]
    assert shlex.split(where_to_look(tracking_uri())) == [
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking_uri(),
    ]


def test_the_database_is_the_projects_also_where_dvc_runs_a_copy(project, monkeypatch):
    here = tracking_uri()
    copy = project / ".dvc/tmp/exps/tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert tracking_uri() == here == f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert tracking_uri() == f"sqlite:///{project}/other.db"


def test_artifacts_lie_beside_the_database_and_passwords_are_not_shown():
    assert artifact_location("sqlite:////a/b/mlflow.db") == "file:///a/b/mlartifacts"
    assert artifact_location("sqlite+pysqlite:////a/100%25/mlflow.db") == "file:///a/100%25/mlartifacts"
    assert artifact_location("http://host") is None
    assert where_to_look("https://user:secret@host:5000/x") == "https://host:5000/x"
