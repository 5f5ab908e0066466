"""The tracking server: its address, made absolute, and a quiet client that gives up on a dead one within seconds."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from pipelines.process import environment
from pipelines.storage.errors import one_line

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
UPLOAD_TIMEOUT = "600"  # seconds: a server answers an upload when its own storage has it


def project_root() -> Path:
    """The project's folder: DVC names it to its stages, also to those it runs in a copy (`dvc exp run --temp`, `--queue`);
    outside DVC it is the working directory."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, by default `sqlite:///mlflow.db` in the project's folder; the same from every directory."""
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db", project_root())


def absolute_uri(uri: str, root: Path) -> str:
    """`uri` with a relative SQLite file, `file:` URI or plain path made absolute, seen from `root`; others as they are."""
    if match := re.fullmatch(r"(sqlite(?:\+\w+)?):///([^?]+)(\?.*)?", uri):
        scheme, path, query = match.groups()
        return uri if path == ":memory:" else f"{scheme}:///{root / path}{query or ''}"
    if uri.startswith("file:"):
        return (root / re.sub(r"^file:(//)?", "", uri)).as_uri()
    if "://" in uri or uri.startswith("databricks"):
        return uri
    return (root / uri).as_uri()


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps artifacts: beside a SQLite file; None (the server decides) for anything else."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(\?.*)?", uri)
    return (Path(match[1]).parent / "mlartifacts").as_uri() if match else None


def shown(uri: str) -> str:
    """`uri` without user and password, for lines that people read."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri


def where_to_look(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """What opens the tracking server, or a run on it: an address, or a command for a database file."""
    if uri.startswith("http"):
        run = "" if run_id is None else f"/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{shown(uri).rstrip('/')}{run}"
    return f"mlflow ui --backend-store-uri {shown(uri)}"


def complaint(error: Exception) -> str:
    """What is wrong with the server, in a few words that follow its name."""
    if cause := re.search(r"\[Errno -?\d+\] [^'\")\]]+|timed? ?out", str(error)):
        return f"is not reachable ({cause[0]})"
    first = str(error).strip().partition("\n")[0]
    return f"refused the request ({one_line(first or type(error).__name__)})"


def prepare() -> None:
    """Sets what mlflow reads when it is imported; called before each import of it."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """A client of the server at `uri`, which is not asked anything yet (but a database file is created)."""
    prepare()
    from mlflow import MlflowClient

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
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    return client.create_experiment(name, artifact_location=artifact_location(uri))
