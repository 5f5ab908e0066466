"""The files by which this machine and a submitted job on a cluster exchange inputs and outputs.

order.json          in the job's working directory, sent with its code: the stages to run, and their inputs
PLACE/outputs/ID    outputs and journals of the stages, one folder per attempt of the job
PLACE/result.json   written last: the attempt that succeeded, and name, bytes and sha256 of each of its files

PLACE is a folder in the storage, and others may be able to write there. So the job reads no order from the
storage and checks its inputs against the order. The machine that takes the outputs checks them too
(`read_result`, `fetch_result`).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter

from pipelines import models
from pipelines.data.shards.publish import explanations_upload, shards_upload
from pipelines.data.shards.stored_explanations import INDEX
from pipelines.storage import files
from pipelines.storage.errors import StorageError, one_line
from pipelines.storage.model_folder import CONFIG
from pipelines.storage.publish import File, Upload, describe, exists, fetch, publish, read_at_most
from pipelines.workflow.places import STORED_EXPLANATIONS

ORDER, RESULT = "order.json", "result.json"
PLACE = "SUBMITTED_PLACE"  # environment variable with PLACE, for the stages of a submitted job
LONGEST_RESULT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Input:
    """Files at `url` that stages need in the local `folder`."""

    folder: str
    url: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class OrderedStage:
    """A stage to run; see `infra.project.Stage`."""

    name: str
    command: str
    outputs: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class Order:
    """The order of a job: run `stages` on `inputs` with `environment`, deliver the outputs to `place`."""

    place: str
    stages: tuple[OrderedStage, ...]
    inputs: tuple[Input, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Result:
    """The result of a job: `files` in `outputs/<attempt>` of its place. `stages` is name -> state."""

    stages: dict[str, str]
    attempt: str
    files: tuple[File, ...]


_ORDER, _RESULT = TypeAdapter(Order), TypeAdapter(Result)


def input_upload(path: str, storage: str) -> Upload | None:
    """Returns the upload of a stage's input, a file or folder; `None` if there is nothing to upload."""
    if path.startswith("data/shards/"):
        return shards_upload(path, storage)
    if path == str(STORED_EXPLANATIONS):
        return explanations_upload(path, storage) if Path(path, INDEX).is_file() else None
    folders = [config.parent for config in sorted(Path(path).rglob(CONFIG))]
    names = [
        (folder / name).relative_to(path).as_posix()
        for folder in folders
        for name in models.model_file_names(folder)
    ]
    content = sha256("".join(f"{folder}{models.digest(folder)}" for folder in folders).encode()).hexdigest()
    return Upload(path, f"{storage.rstrip('/')}/models/{content[:16]}", tuple(names)) if names else None


def publish_input(upload: Upload) -> Input:
    """Publishes an input in the storage.

    Of shards and stored explanations a job only copies the last file, the manifest or index, because workers
    read the rest from the storage.
    """
    in_storage = upload.folder.startswith("data/shards/") or upload.folder == str(STORED_EXPLANATIONS)
    names = upload.names[-1:] if in_storage else upload.names
    return Input(upload.folder, upload.run(), tuple(describe(upload.folder, name) for name in names))


def write_order(folder: Path, order: Order) -> None:
    """Writes the order of a job to its working directory."""
    files.write_json(folder / ORDER, asdict(order))


def read_order(folder: Path) -> Order:
    """Returns the order in a job's working directory; raises `StorageError` if there is none."""
    try:
        return _ORDER.validate_json((folder / ORDER).read_bytes())
    except FileNotFoundError:
        raise StorageError(
            f"{folder.absolute()}: no {ORDER}: this is not the working directory of a submitted job"
        ) from None


def pull_inputs(inputs: Iterable[Input], folder: Path) -> None:
    """Copies inputs to `folder`; raises `StorageError` if a file differs from what was published."""
    for item in inputs:
        fetch(item.url, folder / item.folder, item.files)


def deliver(order: Order, paths: Iterable[str]) -> None:
    """Publishes files and folders of the working directory as the outputs of a job."""
    names = [name for path in paths for name in _names_in(Path(path))]
    result = Result(
        stages={stage.name: stage.state for stage in order.stages},
        attempt=uuid.uuid4().hex[:8],
        files=tuple(describe(".", name) for name in names),
    )
    publish(".", f"{order.place}/outputs/{result.attempt}", names)
    files.write_json(f"{order.place}/{RESULT}", asdict(result))


def read_result(place: str) -> Result:
    """Returns the result that a job delivered to `place`.

    Raises:
        StorageError: there is no `result.json`, or it is not valid.
    """
    if not exists(f"{place}/{RESULT}"):
        raise StorageError(f"{place}: no {RESULT}: no job has delivered its outputs there")
    content = read_at_most(place, RESULT, LONGEST_RESULT)
    try:
        result = _RESULT.validate_json(content, strict=True)
    except ValueError as error:
        raise StorageError(f"{place}/{RESULT}: not the result of a job: {one_line(error)}") from None
    if not re.fullmatch("[0-9a-f]{8}", result.attempt):
        raise StorageError(f"{place}/{RESULT}: attempt {result.attempt[:40]!a} is not one of a job")
    return result


def fetch_result(place: str, result: Result, folder: Path) -> None:
    """Copies the files of `result` to a new `folder`; raises `StorageError` if one differs from its entry."""
    fetch(place, folder, result.files, below=f"outputs/{result.attempt}/")


def _names_in(path: Path) -> list[str]:
    """Returns the path of a file, or the sorted paths of all files in a folder.

    Hidden files and folders are left out, because a kill may have left them half written.
    """
    found = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [item.as_posix() for item in found if not any(part.startswith(".") for part in item.parts)]


def inputs_for_all(storage: str, folders: Iterable[Path]) -> tuple[Input, ...] | None:
    """Publishes outputs of earlier stages in `folders` if trials run on other nodes; else returns `None`.

    Trials run on other nodes if the storage is at a URL and either this is a submitted job or `RAY_ADDRESS`
    is set.
    """
    if "://" not in storage or not (os.environ.get(PLACE) or os.environ.get("RAY_ADDRESS")):
        return None
    made = sorted({os.path.relpath(folder) for folder in folders if folder.is_dir()})
    uploads = [input_upload(path, storage) for path in made]
    return tuple(publish_input(upload) for upload in uploads if upload is not None)


def enter_inputs(inputs: Sequence[Input] | None) -> None:
    """Changes to a folder with `inputs`, unless the working directory has shards."""
    if inputs is not None and not Path("data/shards").is_dir():
        os.chdir(_folder_of(tuple(inputs)).name)


@cache
def _folder_of(inputs: tuple[Input, ...]) -> TemporaryDirectory[str]:
    """Returns a temporary folder with the inputs, one per process."""
    folder = TemporaryDirectory(prefix="inputs-")
    pull_inputs(inputs, Path(folder.name))
    return folder
