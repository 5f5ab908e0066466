"""What work on other machines needs of this one, and what it leaves for this one at a place in the storage.

order.json          in the job's working directory, which comes with its code: what to run, and the inputs that it needs
PLACE/outputs/ID    what the stages made and tracked, one folder per try
PLACE/result.json   written last: which of these folders, and name, bytes and sha256 of each file

Whoever may write to the storage may write these, too. So the job takes no order from there and checks its inputs, and who
takes the outputs checks those (`read_result`).
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
from pipelines.models.folder import CONFIG
from pipelines.storage import files
from pipelines.storage.errors import StorageError, one_line
from pipelines.storage.publish import File, Upload, describe, exists, fetch, publish, read_at_most
from pipelines.workflow.places import STORED_EXPLANATIONS

ORDER, RESULT = "order.json", "result.json"
PLACE = "SUBMITTED_PLACE"  # environment variable of a submitted job's stages: its place
LONGEST_RESULT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Input:
    """Files at `url` that stages need in `folder`."""

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
    """What a job does: it runs `stages`, which need `inputs` and are told `environment`, and delivers to `place`."""

    place: str
    stages: tuple[OrderedStage, ...]
    inputs: tuple[Input, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Result:
    """What a job delivered: `files` in the folder `outputs/<attempt>` of its place; `stages` are name -> state."""

    stages: dict[str, str]
    attempt: str
    files: tuple[File, ...]


_ORDER, _RESULT = TypeAdapter(Order), TypeAdapter(Result)


def input_upload(path: str, storage: str) -> Upload | None:
    """What has to be in the storage for a stage that needs the files or folders at `path`; None if there is nothing."""
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

    A job gets the index alone of shards and stored explanations, because workers read them in the storage.
    """
    in_storage = upload.folder.startswith("data/shards/") or upload.folder == str(STORED_EXPLANATIONS)
    names = upload.names[-1:] if in_storage else upload.names
    return Input(upload.folder, upload.run(), tuple(describe(upload.folder, name) for name in names))


def write_order(folder: Path, order: Order) -> None:
    """Writes the order of a job to its working directory."""
    files.write_json(folder / ORDER, asdict(order))


def read_order(folder: Path) -> Order:
    """The order of the job with this working directory; raises `StorageError` if there is none."""
    try:
        return _ORDER.validate_json((folder / ORDER).read_bytes())
    except FileNotFoundError:
        raise StorageError(
            f"{folder.absolute()}: no {ORDER}: this is not the working directory of a submitted job"
        ) from None


def pull_inputs(inputs: Iterable[Input], folder: Path) -> None:
    """Copies inputs to a folder, in which stages find them; raises `StorageError` if one is not what was published."""
    for item in inputs:
        fetch(item.url, folder / item.folder, item.files)


def deliver(order: Order, paths: Iterable[str]) -> None:
    """Publishes files and folders of the working directory as what a job made."""
    names = [name for path in paths for name in _names_in(Path(path))]
    result = Result(
        stages={stage.name: stage.state for stage in order.stages},
        attempt=uuid.uuid4().hex[:8],
        files=tuple(describe(".", name) for name in names),
    )
    publish(".", f"{order.place}/outputs/{result.attempt}", names)
    files.write_json(f"{order.place}/{RESULT}", asdict(result))


def read_result(place: str) -> Result:
    """What the job at `place` delivered.

    Raises:
        StorageError: it has delivered nothing, or its `result.json` is not one.
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
    """Copies what the job delivered to a new folder; raises `StorageError` unless each file is what `result` says."""
    fetch(place, folder, result.files, below=f"outputs/{result.attempt}/")


def _names_in(path: Path) -> list[str]:
    """The name of a file, or of all files in a folder, sorted, without hidden ones, which a kill may have left half written."""
    found = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [item.as_posix() for item in found if not any(part.startswith(".") for part in item.parts)]


def inputs_for_all(storage: str, folders: Iterable[Path]) -> tuple[Input, ...] | None:
    """Publishes what earlier stages made in `folders` for trials on other nodes; None if they read it here.

    They are on other nodes in a submitted job, and if `RAY_ADDRESS` names a cluster and the storage is at a URL.
    """
    if "://" not in storage or not (os.environ.get(PLACE) or os.environ.get("RAY_ADDRESS")):
        return None
    made = sorted({os.path.relpath(folder) for folder in folders if folder.is_dir()})
    uploads = [input_upload(path, storage) for path in made]
    return tuple(publish_input(upload) for upload in uploads if upload is not None)


def enter_inputs(inputs: Sequence[Input] | None) -> None:
    """Makes a folder with `inputs` the working directory, if the shards are not in the present one."""
    if inputs is not None and not Path("data/shards").is_dir():
        os.chdir(_folder_of(tuple(inputs)).name)


@cache
def _folder_of(inputs: tuple[Input, ...]) -> TemporaryDirectory[str]:
    """A folder of this process with the inputs."""
    folder = TemporaryDirectory(prefix="inputs-")
    pull_inputs(inputs, Path(folder.name))
    return folder
