import shutil

import pytest

from tests.support.project import Project


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A project in which DVC has run the whole graph at toy size, committed."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.run("dvc exp run -S recipe=smoke")
    project.run("git add -A && git -c user.name=a -c user.email=a@b.example commit -qm trained")
    return project


@pytest.fixture(scope="session")
def database(project, tmp_path_factory):
    """A copy of the project's MLflow database. The artifacts stay in the project."""
    return shutil.copy(project.folder / "mlflow.db", tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def workspace(project, database, tmp_path, monkeypatch):
    """A copy of the graph's outputs; it is the working directory of stages that run in this process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return project.copy(tmp_path / "work")
