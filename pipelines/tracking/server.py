"""The tracking server: its absolute address, and a quiet client that gives up on it within seconds."""

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

from pipelines.errors import UserError, redacted
from pipelines.process import environment
from pipelines.storage.errors import one_line
from pipelines.storage.paths import project_root
from pipelines.storage.retry import CLIENTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {  # for variables that the environment does not set
    "MLFLOW_DISABLE_TELEMETRY": "true",  # otherwise each run is reported to MLflow's makers
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # hides the lines on database migrations and registrations
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's default, 7 retries of 120 s, would hold up training for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
}
LIBRARIES = {"alembic", "mlflow", "sqlalchemy", "sqlite3"} | CLIENTS  # their errors count as MLflow's own
UPLOAD_TIMEOUT = "600"  # seconds; a server answers an upload only when its own storage has the file
# The path is percent-encoded.
_SQLITE = re.compile(r"sqlite(?P<driver>\+\w+)?:///(?P<path>[^?]+)(?P<query>\?.*)?")


class TrackingError(UserError, RuntimeError):
    """The registry does not answer or refuses a request. The message names its address and the cause."""


def tracking_uri() -> str:
    """Returns `MLFLOW_TRACKING_URI`, by default `sqlite:///mlflow.db` in the project; always absolute."""
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db", project_root())


def absolute_uri(uri: str, root: Path) -> str:
    """Makes a relative SQLite file, `file:` URI or plain path absolute from `root`; keeps any other `uri`."""
    if match := _SQLITE.fullmatch(uri):
        return uri if match["path"] == ":memory:" else _sqlite_uri(root / unquote(match["path"]), match)
    if uri.startswith("file:"):
        return (root / unquote(re.sub(r"^file:(//(localhost(?=/))?)?", "", uri))).as_uri()
    if "://" in uri or uri.startswith("databricks"):
        return uri
    return (root / uri).as_uri()


def _sqlite_uri(path: Path, given: re.Match[str]) -> str:
    """Returns the SQLite address of `path` with the driver and query of the `given` address.

    SQLAlchemy decodes the path, but MLflow creates its folder under the encoded name unless the address names
    a driver.
    """
    encoded = str(path).replace("%", "%25").replace("?", "%3F")
    driver = given["driver"] or ("+pysqlite" if "%" in encoded else "")
    return f"sqlite{driver}:///{encoded}{given['query'] or ''}"


def artifact_location(uri: str) -> str | None:
    """Returns the folder of a new experiment's artifacts beside a SQLite file; `None` for a server."""
    match = _SQLITE.fullmatch(uri)
    return (Path(unquote(match["path"])).parent / "mlartifacts").as_uri() if match else None


def where_to_look(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """Returns the address of the tracking server or of a run; for a database file, the command to view it."""
    if uri.startswith("http"):
        run = "" if run_id is None else f"/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{redacted(uri).rstrip('/')}{run}"
    return f"mlflow ui --backend-store-uri {shlex.quote(redacted(uri))}"


def complaint(error: Exception) -> str:
    """Returns the cause of a server's `error`, as a phrase that follows the server's name."""
    if cause := re.search(r"\[Errno -?\d+\] [^'\")\]]+|timed? ?out", str(error)):
        return f"is not reachable ({cause[0]})"
    first = str(error).strip().partition("\n")[0]
    return f"refused the request ({one_line(first or type(error).__name__)})"


def is_of_mlflow(error: Exception) -> bool:
    """Returns True if MLflow, one of its libraries or the connection raised the error, not this project."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in LIBRARIES


@contextmanager
def in_one_line(uri: str) -> Iterator[None]:
    """Turns errors of MLflow, its libraries and the connection into a `TrackingError`."""
    prepare()
    try:
        yield
    except Exception as error:
        if not is_of_mlflow(error):
            raise
        raise TrackingError(f"MLflow at {uri} {complaint(error)}") from error


@contextmanager
def alone(uri: str, work: str) -> Iterator[bool]:
    """Lets one process of this machine at a time do `work` on a SQLite file; yields whether it does.

    It does nothing for a server.
    """
    match = _SQLITE.fullmatch(uri)
    if match is None or match["path"] == ":memory:":
        yield False
        return
    path = Path(f"{unquote(match['path'])}.{work}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def prepare() -> None:
    """Sets the environment variables that mlflow reads on import; call it before each such import."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """Returns a client of the server at `uri`, without a request to it.

    If `uri` is a database file that does not exist, one process at a time creates it.
    """
    prepare()
    from mlflow import MlflowClient

    with alone(uri, "create"):
        return MlflowClient(tracking_uri=uri)


def as_default(uri: str) -> AbstractContextManager[None]:
    """Makes `uri` the process's tracking address in the block.

    A registry in a database needs this to resolve `models:/`.
    """
    return environment("MLFLOW_TRACKING_URI", uri)


def uploading() -> AbstractContextManager[None]:
    """Gives requests in the block the timeout of uploads, unless the environment sets a timeout."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    return environment(name, UPLOAD_TIMEOUT if os.environ[name] == SETTINGS[name] else os.environ[name])


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the id of the experiment `name`, which it creates if there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process has just created it
            assert experiment is not None
    return experiment.experiment_id
