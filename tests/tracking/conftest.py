import shutil
import socket

import pytest

from pipelines.tracking import review
from pipelines.tracking.server import connect
from tests.support.desk import NAME


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


@pytest.fixture
def alice(monkeypatch):
    monkeypatch.setenv("LOGNAME", "alice")


@pytest.fixture
def add(client, project):
    """Returns a function that adds a version and returns its number."""
    experiment = client.create_experiment("demo", artifact_location=(project / "mlartifacts").as_uri())
    client.create_registered_model(NAME)

    def add(gates=None, **tags):
        run = client.create_run(experiment)
        tags = {"content.sha256": run.info.run_id, **({"gates": gates} if gates else {}), **tags}
        version = client.create_model_version(NAME, "models/x", run.info.run_id, tags=tags)
        client.set_registered_model_alias(NAME, "candidate", version.version)
        return str(version.version)

    return add


@pytest.fixture
def desk(capsys):
    """Returns a function that runs a command and returns its exit code and what it printed."""

    def desk(*arguments):
        capsys.readouterr()
        status = review.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return desk


@pytest.fixture
def approve(desk):
    def approve(number, *more):
        return desk("approve", f"{NAME}/{number}", "--reason", "better", *more)

    return approve
