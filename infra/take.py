"""Fetches the outputs of a submitted job: checks them in a folder of their own, moves them, tells DVC.

The outputs of a stage are those in this machine's `dvc.yaml`. The content of the storage is not trusted.
`submitted_job.read_result` and `fetch_result` refuse everything but plain files with the stated content. This
module refuses files that belong to no output.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from infra import project
from infra.project import SubmitError
from pipelines.storage.errors import one_line
from pipelines.tracking.journal import Journal
from pipelines.tracking.server import tracking_uri, where_to_look
from pipelines.tracking.sync import sync
from pipelines.workflow.submitted_job import Result, fetch_result, read_result

# Journals of the runs that the job tracked. They are logged to MLflow, but not kept as files.
JOURNALS = re.compile("runs/.+/tracking/.+")


def take(place: str) -> int:
    """Puts the outputs of a finished job where its stages would have put them, and records them in DVC.

    Raises:
        SubmitError, StorageError: outputs are missing, damaged or do not belong to the job's stages, or code,
            params or inputs have changed since the job was submitted. Then nothing here is changed.
    """
    place = place.rstrip("/")
    stages = project.stages_of(place.rpartition("/")[2])
    result = read_result(place)
    if result.stages != {stage.name: stage.state for stage in stages}:
        names = ", ".join(stage.name for stage in stages)
        raise SubmitError(
            f"{names}: code, params or inputs here are no longer those submitted; outputs stay in {place}"
        )
    outputs = [output for stage in stages for output in stage.outputs]
    check(result, outputs, place)
    project.check_no_links(outputs)
    with tempfile.TemporaryDirectory(prefix=".taken-", dir=".") as folder:
        taken = Path(folder, "taken")
        fetch_result(place, result, taken)
        with put_in_place(taken, outputs, Path(folder, "before")):
            for stage in stages:
                project.commit(stage.name)
        for stage in stages:
            print(f"{stage.name}: {', '.join(stage.outputs)} brought and recorded in dvc.lock")
        track(taken, place)
    return 0


def check(result: Result, outputs: Sequence[str], place: str) -> None:
    """Raises `SubmitError` unless each file belongs to an output or a journal, and each output has files."""
    found = set()
    for file in result.files:
        output = next(
            (output for output in outputs if file.name == output or file.name.startswith(f"{output}/")), None
        )
        if output is None and not JOURNALS.fullmatch(file.name):
            raise SubmitError(
                f"{place}: {file.name[:200]} is in no output of the stage ({', '.join(outputs)}): "
                "nothing is taken"
            )
        found.add(output)
    missing = [output for output in outputs if output not in found]
    if missing:
        raise SubmitError(f"{place}: {missing[0]} was not delivered: nothing is taken")


@contextmanager
def put_in_place(taken: Path, outputs: Sequence[str], before: Path) -> Iterator[None]:
    """Moves outputs from `taken` to the working directory. If the block raises, the old ones are restored.

    Args:
        taken: folder with the new outputs, by their names.
        outputs: names of the files and folders to move.
        before: path of a new folder for the old outputs.
    """
    before.mkdir()
    # Per output: its path, where the old one was moved to, and whether there was an old one.
    undo: list[tuple[Path, Path, bool]] = []
    try:
        for number, output in enumerate(outputs):
            target, old = Path(output), before / str(number)
            undo.append((target, old, os.path.lexists(target)))
            if os.path.lexists(target):
                shutil.move(target, old)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(taken / output, target)
        yield
    except BaseException:
        for target, old, existed in reversed(undo):
            if os.path.lexists(old) or not existed:
                remove(target)
            if os.path.lexists(old):
                shutil.move(old, target)
        raise


def remove(path: Path) -> None:
    """Deletes a file, link or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def track(taken: Path, place: str) -> None:
    """Logs the runs of a job to MLflow that it logged nowhere, or only to files in its own directory.

    A failure prints one line and ends the logging.
    """
    for path in sorted(taken.glob("runs/**/tracking/run.json")):
        journal = Journal(path.parents[1])
        try:
            head = journal.head
            if not head["logged"] or head["tracking_uri"].startswith(("sqlite:", "file:")):
                run = sync(journal, tracking_uri())
                look = where_to_look(tracking_uri(), run.info.experiment_id, run.info.run_id)
                print(f"MLflow run {head['stage']} {run.info.run_id}: {look}")
        # No error of a server or a journal may fail `take`, because the outputs are here already.
        except Exception as error:
            again = f"python -m infra.submit --take {place}"
            print(
                f"not logged to MLflow: {one_line(error)}; nothing is lost: log it later with `{again}`",
                file=sys.stderr,
            )
            return
