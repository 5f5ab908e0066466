"""What work on other machines needs of this one, as a place in the storage says it.

PLACE/order.json    the stages to run and the inputs that they need
PLACE/outputs/ID    what the stages made and tracked, one folder per try
PLACE/result.json   written last: which of these folders, and name, bytes and sha256 of each output
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from pipelines import models
from pipelines.data.shards.manifest import MANIFEST
from pipelines.data.shards.publish import publish_explanations, publish_shards
from pipelines.data.shards.stored_explanations import INDEX
from pipelines.models.store import CONFIG, WEIGHTS
from pipelines.storage import files
from pipelines.storage.errors import StorageError
from pipelines.storage.publish import publish, pull
from pipelines.workflow.places import STORED_EXPLANATIONS

PLACE = "SUBMITTED_PLACE"  # environment variable: the place of the submitted job that a stage is part of


class Input(TypedDict):
    """Files `names` at `url` that the stages need in `folder`."""

    folder: str
    url: str
    names: list[str]


class Order(TypedDict):
    """What a job runs; `stages` as `infra.project.Stage` has them."""

    stages: list[dict[str, Any]]
    inputs: list[Input]
    environment: dict[str, str]  # tells the stages where they come from


def publish_input(path: str, storage: str) -> Input:
    """Publishes an input in the storage.

    A job gets the index alone of shards and stored explanations, because workers read them in the storage.
    """
    if path.startswith("data/shards/"):
        return {"folder": path, "url": publish_shards(path, storage), "names": [MANIFEST]}
    if path == str(STORED_EXPLANATIONS):
        stored = Path(path, INDEX).is_file()
        return {"folder": path, "url": publish_explanations(path, storage) if stored else "", "names": [INDEX] if stored else []}
    folders = [config.parent for config in sorted(Path(path).rglob(CONFIG))]
    names = [(folder / name).relative_to(path).as_posix() for folder in folders for name in (WEIGHTS, CONFIG)]
    content = hashlib.sha256("".join(f"{folder}{models.digest(folder)}" for folder in folders).encode()).hexdigest()
    return {"folder": path, "url": publish(path, f"{storage}/models/{content[:16]}", names), "names": names}


def write_order(place: str, order: Order) -> None:
    """Writes `order.json`; inputs without files are left out."""
    files.write_json(f"{place}/order.json", {**order, "inputs": [item for item in order["inputs"] if item["names"]]})


def pull_inputs(place: str, folder: Path) -> Order:
    """Copies the inputs of the job at `place` to a folder, in which its stages find them; returns the order.

    Raises:
        StorageError: there is no order.
    """
    order: Order | None = files.read_json(f"{place}/order.json")
    if order is None:
        raise StorageError(f"{place}: no order.json: nothing was submitted there")
    for item in order["inputs"]:
        pull(item["url"], folder / item["folder"], item["names"])
    return order


def deliver(place: str, outputs: Iterable[str]) -> None:
    """Publishes files and folders of the working directory as the outputs of the job at `place`."""
    names = [path.as_posix() for output in outputs for path in _files_in(Path(output))]
    url = publish(".", f"{place}/outputs/{uuid.uuid4().hex[:8]}", names)
    files.write_json(f"{place}/result.json", {"outputs": url, "files": [file_record(Path(name)) for name in names]})


def file_record(path: Path) -> dict[str, Any]:
    """Name, bytes and sha256 of a file."""
    return {"name": path.as_posix(), "bytes": path.stat().st_size, "sha256": files.file_digest(path)}


def _files_in(path: Path) -> list[Path]:
    """A file, or all files in a folder, sorted by name."""
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def place_of_inputs(storage: str, folders: Iterable[Path]) -> str | None:
    """The place where trials on other nodes find what earlier stages made in `folders`; None if they read it here.

    It is that of the submitted job, or a new one if `RAY_ADDRESS` names a cluster and the storage is at a URL.
    """
    place = os.environ.get(PLACE)
    if place is not None or not os.environ.get("RAY_ADDRESS") or "://" not in storage:
        return place
    storage = storage.rstrip("/")
    made = sorted({os.path.relpath(folder) for folder in folders if folder.is_dir()})
    place = f"{storage}/jobs/search-{uuid.uuid4().hex[:8]}"
    write_order(place, {"stages": [], "inputs": [publish_input(path, storage) for path in made], "environment": {}})
    return place


def enter_inputs(place: str | None) -> None:
    """Makes a folder with the inputs of the job at `place` the working directory, if the shards are not in the present one."""
    if place is not None and not Path("data/shards").is_dir():
        os.chdir(_inputs(place).name)


@cache
def _inputs(place: str) -> TemporaryDirectory[str]:
    """A folder of this process with the inputs of the job at `place`."""
    folder = TemporaryDirectory(prefix="inputs-")
    pull_inputs(place, Path(folder.name))
    return folder
