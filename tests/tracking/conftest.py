import shutil
import socket

import pytest

from pipelines.tracking.server import connect


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A new MLflow database, created only once because that takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path, monkeypatch, empty_database):
    """A project's folder with an empty database; it is the working directory."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


@pytest.fixture
def client(project):
    return connect(f"sqlite:///{project}/mlflow.db")


@pytest.fixture
def dead_server():
    """An address at which no server listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def manifest():
    shard = {"name": "test-000000.tar", "bytes": 10, "sha256": "00" * 32, "count": 7}
    split = {"train": [shard, shard], "test": [shard]}
    return {
        "classes": ["cat", "dog", "owl"],
        "task": "multiclass",
        "source": "scenes",
        "checksum": "ab" * 32,
        "splits": split,
    }
