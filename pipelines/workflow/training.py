"""The tracked run of a stage, and training that resumes where it was killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import models, tracking
from pipelines.data.shards.manifest import read_manifest
from pipelines.params import Params, ParamsError, keyed
from pipelines.storage import files
from pipelines.storage.lease import held
from pipelines.storage.paths import run_directory, users_path
from pipelines.training import Result, checkpoints, train
from pipelines.workflow import identity
from pipelines.workflow.places import shards_of
from pipelines.workflow.reports import report_training
from pipelines.workflow.tasks import Task

# File beside checkpoints at a URL, with the key of the tracked run that a resumed stage continues.
UNFINISHED = "execution.json"


@contextmanager
def tracked(
    params: Params,
    name: str,
    *settings: Any,
    upstream: Sequence[Path] = (),
    code: Sequence[str] = identity.TRAINING,
    context: str = "training",
) -> Iterator[tuple[tracking.StageRun, str]]:
    """Yields the tracked run of a stage and the directory where a killed stage resumes.

    The directory's name is a hash of `settings`, shards, `upstream` and `code`, so a stage never resumes from
    stale work.

    Args:
        params: params of the run.
        name: name of the stage.
        settings: params that the outcome depends on.
        upstream: folders of the models of earlier stages that the outcome depends on.
        code: modules that compute the outcome.
        context: purpose of the data, as MLflow shows it.

    Raises:
        LeaseError: another driver runs this very stage, or has taken it over.
    """
    shards = shards_of(params.dataset)
    manifest = read_manifest(shards)
    origin = (manifest.digest, identity.code_digest(*code), *(models.digest(path) for path in upstream))
    directory = run_directory(params.storage.root, name, params.dataset, *settings, *origin)
    outlives = "://" in directory  # survives the loss of this machine, on which the journal is
    with held(directory) as lease:
        with tracking.stage_run(
            name,
            experiment=params.tracking.experiment,
            params=params.model_dump(mode="json"),
            directory=directory,
            inputs={"shards": shards, **{path.name: str(path) for path in upstream}},
            key=files.read_record(f"{directory}/{UNFINISHED}", str) if outlives else None,
            taken_over=lambda: lease.lost,
        ) as run:
            if outlives:
                files.write_json(f"{directory}/{UNFINISHED}", run.key)
            run.dataset(manifest.to_json(), name=params.dataset, context=context)
            yield run, directory
            lease.check()
        if outlives:
            try:
                files.write_json(f"{directory}/{UNFINISHED}", None)
            except OSError as error:  # no reason to fail, because the stage is done
                told = "run again, the stage would go on with this MLflow run"
                print(f"{directory}/{UNFINISHED} stays: {error}; {told}", file=sys.stderr)


def train_stage(task: Task) -> None:
    """Trains the task. Saves the best epoch's model in `models/<name>`, its figures in `reports/<name>`."""
    name, folder = task.name, Path("models", task.name)
    with tracked(task.params, name, *identity.of_training(task), upstream=task.upstream) as (run, directory):
        adopt_checkpoints(task, run, directory)
        with keyed(task.section, task.method), keyed("training", task.params.training):
            result = train(task.job(directory, on_epoch=run.epoch_logger(), report_key=run.key))
        save_best(task, result, folder)
        report_training(name, result, task.method.objectives)
        for file, content in task.all_notes().items():
            files.write_json(folder / file, content)
            run.artifact(folder / file, "model")
        run.history(result.history)
        run.model(folder)


def adopt_checkpoints(task: Task, run: tracking.StageRun, directory: str) -> None:
    """Copies the checkpoints of the earlier run `training.resume` to `directory`, unless it has its own.

    Does nothing if `training.resume` is the run of another stage.

    Raises:
        ParamsError: the earlier run has no checkpoint.
    """
    source = earlier_run(task)
    if source is None or source == directory:
        return
    check_resumable(source)
    with held(directory) as lease:
        if checkpoints.newest(directory) is None:
            checkpoints.copy(source, directory, lease)
    run.tag("resumed_from", source)


def earlier_run(task: Task) -> str | None:
    """Returns the run directory in `training.resume`, `None` if it is not one of this stage."""
    named = task.params.training.resume
    source = None if named is None else users_path(named)
    return None if source is None or f"/{task.name}/" not in source else source


def check_resumable(directory: str) -> None:
    """Raises `ParamsError` unless the directory of an earlier run has a complete checkpoint."""
    if checkpoints.newest(directory) is None:
        raise ParamsError(f"training.resume: there is no whole checkpoint in {directory}")


def save_best(task: Task, result: Result, out: Path) -> None:
    """Saves the best epoch's model to the folder `out`."""
    module = task.build().module
    result.load_best(module)
    task.save(out, module, task.spec)
