"""Checks a training stage, `explain` or the search for errors before anything is uploaded or started."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.methods import check_pair
from pipelines.models import read_spec
from pipelines.params import Params, check_space, keyed, replaced
from pipelines.storage.paths import users_path
from pipelines.training.preflight import check
from pipelines.workflow.places import model_folder, shards_of
from pipelines.workflow.tasks import TASKS, Task, student_spec
from pipelines.workflow.training import check_resumable, earlier_run
from pipelines.workflow.trials import task_of, with_measurable_metrics

NOWHERE = "runs/none"  # the directory of a run that has no checkpoints


def check_stage(name: str, params: Params) -> list[Path]:
    """Raises the error that would end the stage before its first step. Reads local files, uploads nothing.

    Args:
        name: name of a training stage, `explain` or `search`, as DVC addresses it, e.g. `bcosify@pretrained`.
        params: the params of the stage.

    Returns:
        Paths of local files that the stage reads and that no earlier stage made: its weights file and the run
        that it resumes.

    Raises:
        UserError, FileNotFoundError: the stage would fail with this error.
    """
    # A local storage, because with one at a URL tasks would upload what their workers read.
    here = replaced(params, {"storage.root": "runs"})
    stage, _, which = name.partition("@")
    if stage == "explain":
        check_explain(here)
        return []
    if stage == "search":
        check_space(here, "params.yaml: search.space")
        task = task_of(here, {})
        with_measurable_metrics(here, task)
    else:
        task = TASKS[stage](here, *([which] if which else []))
    check_task(task)
    source = None if stage == "search" else earlier_run(task)
    if source is not None:
        check_resumable(source)
    weights = None if task.model is None else task.model.weights
    paths = [Path(users_path(place)) for place in (weights, source) if place is not None]
    return [path for path in paths if path.exists()]


def check_task(task: Task) -> None:
    """Raises the error that would end the training of `task` before its first step."""
    with keyed(task.section, task.method), keyed("training", task.params.training):
        check(task.job(NOWHERE))


def check_explain(params: Params) -> None:
    """Raises the error that would end the stage `explain` before its first image."""
    if not any(getattr(params.distill, run).explanations == "frozen" for run in params.distill.runs):
        return
    teacher, shards = read_spec(model_folder("teacher")), shards_of(params.dataset)
    with keyed("distill", params.distill):
        check_pair(student_spec(params, read_manifest(shards), teacher), teacher, explained=True)
        if params.distill.shots is not None:
            few_shot(shards, "train", params.distill.shots, params.distill.shots_seed)
