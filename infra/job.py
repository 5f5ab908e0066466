"""`python -m infra.job PLACE`: what a submitted job runs on the cluster; see `infra.submit`.

PLACE/order.json    the stages to run and what they need
PLACE/outputs/ID    what they made and tracked, a folder for each try
PLACE/result.json   written last: which of these folders, and name, bytes and sha256 of each output
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from pipelines.data.shards.sample import DataError
from pipelines.storage import files
from pipelines.storage.errors import one_line
from pipelines.storage.publish import publish, pull

PLACE = "SUBMITTED_PLACE"  # tells a stage that it is a job's, and of which


class Input(TypedDict):
    """Files `names` at `url` that the stages need in `folder`."""

    folder: str
    url: str
    names: list[str]


class Order(TypedDict):
    """What a job is to do; `stages` as `infra.project.Stage` has them."""

    stages: list[dict[str, Any]]
    inputs: list[Input]
    environment: dict[str, str]  # what the stages are told of where they come from


def main(place: str) -> int:
    """Brings the inputs, runs the stages, puts their outputs to `place`; returns the exit status of the first that failed."""
    try:
        order = pull_inputs(place, Path())
    except OSError as error:
        sys.exit(f"the cluster cannot read {place}: {one_line(error)}")
    told = os.environ | order["environment"] | {PLACE: place}
    for stage in order["stages"]:
        print(f"stage {stage['name']}: {stage['command']}", flush=True)
        if status := subprocess.call(stage["command"], shell=True, env=told):
            return status
    try:
        tracked = [str(path) for path in Path("runs").glob("**/tracking")]  # maybe on no server, and this directory is the job's
        deliver(place, [*(path for stage in order["stages"] for path in stage["outputs"]), *tracked])
    except (OSError, DataError) as error:
        sys.exit(f"the outputs do not get to {place}: {one_line(error)}")
    return 0


def pull_inputs(place: str, folder: Path) -> Order:
    """Leaves the inputs of the job at `place` in a folder, as stages find them in their working directory; returns its order."""
    order: Order | None = files.read_json(f"{place}/order.json")
    if order is None:
        sys.exit(f"{place}: no order.json: nothing was submitted there")
    for item in order["inputs"]:
        pull(item["url"], folder / item["folder"], item["names"])
    return order


def deliver(place: str, outputs: Iterable[str]) -> None:
    """Puts files and folders of the working directory to `place`."""
    names = [path.as_posix() for output in outputs for path in files_in(Path(output))]
    url = publish(".", f"{place}/outputs/{uuid.uuid4().hex[:8]}", names)
    files.write_json(f"{place}/result.json", {"outputs": url, "files": [described(Path(name)) for name in names]})


def files_in(path: Path) -> list[Path]:
    """A file, or all files in a folder, in the order of their names."""
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def described(path: Path) -> dict[str, Any]:
    """Name, bytes and sha256 of a file."""
    return {"name": path.as_posix(), "bytes": path.stat().st_size, "sha256": files.file_digest(path)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
