"""The tracking server: its address, made absolute, and a quiet client that gives up on a dead one within seconds."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipelines.errors import redacted
from pipelines.process import environment
from pipelines.storage.errors import one_line
from pipelines.storage.paths import project_root
from pipelines.storage.retry import CLIENTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {  # where the environment does not say otherwise
    "MLFLOW_DISABLE_TELEMETRY": "true",  # or each run is reported to MLflow's makers
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no lines on database migrations and registrations
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own 7 retries of 120 s would hold up training for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
LIBRARIES = {
    "alembic",
    "mlflow",
    "sqlalchemy",
    "sqlite3",
} | CLIENTS  # whose errors are MLflow's own, for one who asks it
UPLOAD_TIMEOUT = "600"  # seconds: a server answers an upload when its own storage has it
_SQLITE = re.compile(
    r"sqlite(?P<driver>\+\w+)?:///(?P<path>[^?]+)(?P<query>\?.*)?"
)  # the path is percent-encoded


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, by default `sqlite:///mlflow.db` in the project's folder; the same from every directory."""
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db", project_root())


def absolute_uri(uri: str, root: Path) -> str:
    """`uri` with a relative SQLite file, `file:` URI or plain path made absolute, seen from `root`; others as they are."""
    if match := _SQLITE.fullmatch(uri):
        return uri if match["path"] == ":memory:" else _sqlite_uri(root / unquote(match["path"]), match)
    if uri.startswith("file:"):
        return (root / unquote(re.sub(r"^file:(//(localhost(?=/))?)?", "", uri))).as_uri()
    if "://" in uri or uri.startswith("databricks"):
        return uri
    return (root / uri).as_uri()


def _sqlite_uri(path: Path, given: re.Match[str]) -> str:
    """The SQLite address of `path`, with the driver and the query of the address that was `given`.

    SQLAlchemy decodes the path. MLflow makes a folder of it as it stands, unless the address names a driver.
    """
    encoded = str(path).replace("%", "%25").replace("?", "%3F")
    driver = given["driver"] or ("+pysqlite" if "%" in encoded else "")
    return f"sqlite{driver}:///{encoded}{given['query'] or ''}"


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps artifacts: beside a SQLite file; None (the server decides) for anything else."""
    match = _SQLITE.fullmatch(uri)
    return (Path(unquote(match["path"])).parent / "mlartifacts").as_uri() if match else None


def where_to_look(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """What opens the tracking server, or a run on it: an address, or a command for a database file."""
    if uri.startswith("http"):
        run = "" if run_id is None else f"/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{redacted(uri).rstrip('/')}{run}"
    return f"mlflow ui --backend-store-uri {shlex.quote(redacted(uri))}"


def complaint(error: Exception) -> str:
    """What is wrong with the server, in a few words that follow its name."""
    if cause := re.search(r"\[Errno -?\d+\] [^'\")\]]+|timed? ?out", str(error)):
        return f"is not reachable ({cause[0]})"
    first = str(error).strip().partition("\n")[0]
    return f"refused the request ({one_line(first or type(error).__name__)})"


def is_of_mlflow(error: Exception) -> bool:
    """Whether MLflow, a library that it uses or the way to it raised the error, and not this project's code."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in LIBRARIES


@contextmanager
def alone(uri: str, work: str) -> Iterator[None]:
    """Waits until no other process here does this `work` on the same SQLite file. For a server it does nothing."""
    match = _SQLITE.fullmatch(uri)
    if match is None or match["path"] == ":memory:":
        yield
        return
    path = Path(f"{unquote(match['path'])}.{work}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare() -> None:
    """Sets what mlflow reads when it is imported; called before each import of it."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """A client of the server at `uri`, which is not asked anything yet (but a database file is created, by one process)."""
    prepare()
    from mlflow import MlflowClient

    with alone(uri, "create"):
        return MlflowClient(tracking_uri=uri)


def as_default(uri: str) -> AbstractContextManager[None]:
    """Makes `uri` the process's own tracking address meanwhile: a registry in a database resolves `models:/` through that."""
    return environment("MLFLOW_TRACKING_URI", uri)


def uploading() -> AbstractContextManager[None]:
    """Gives requests the time that files take, unless the environment set the time."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    return environment(name, UPLOAD_TIMEOUT if os.environ[name] == SETTINGS[name] else os.environ[name])


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment `name`, created where there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process has created it meanwhile
            assert experiment is not None
    return experiment.experiment_id
