"""A trial of the stage `search`: the searched stage's work with some params replaced."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infra.job import pull_inputs
from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.evaluation import evaluate
from pipelines.params import EvaluateParams, GuidanceParams, Params, ParamsError, replaced
from pipelines.training import Context, EpochRecord, Result, launch, train
from pipelines.workflow.running import Task, save_best, shards_for_all
from stages import bcosify, distill, guide

TASKS: dict[str, Callable[..., Task]] = {"bcosify": bcosify.task, "distill": distill.task, "guide": guide.task}


def task_of(params: Params, values: dict[str, Any]) -> Task:
    """The task of the searched stage with these `values` in its params, at the length and with the workers of a trial."""
    of_trials = {f"{params.search.section}.epochs": params.search.epochs, "training.workers": params.search.workers}
    stage, _, which = params.search.stage.partition("@")
    task = TASKS[stage](replaced(params, of_trials | values, "search.space"), *([which] if which else []))
    if params.search.shots is None:
        return task
    return replace(task, subset=few_shot(shards_for_all(task.params), "train", params.search.shots, params.search.seed))


def check_metrics(params: Params, task: Task) -> None:
    """Raises `ParamsError` where a metric of the search is not one that trials have."""
    each_epoch = [f"val/{name}" for name in task.build().metrics()]
    boxes = "boxes" in read_manifest(task.job("").shards).fields.get("val", ())
    at_the_end = ["val/gridpg"] * (task.spec.task == "multiclass") + ["val/epg", "val/size_corrected_epg", "val/iou"] * boxes
    for number, name in enumerate(params.search.metrics):
        halves = number == 0 and params.search.asha is not None
        allowed = each_epoch if halves else dict.fromkeys([*each_epoch, *at_the_end])
        if name not in allowed:
            which = "the first one, by which search.asha judges each epoch, can be" if halves else "there are"
            raise ParamsError(f"search.metrics: no metric {name!r}; {which} {', '.join(allowed)}")


def run_trial(
    params: Params,
    place: str | None,
    values: dict[str, Any],
    directory: str,
    on_epoch: Callable[[EpochRecord], None],
    sharing: int,
) -> dict[str, float]:
    """The metrics of the trial's best epoch on the validation split; trains it first, see `pipelines.search.tune.Work`.

    `place` is where the inputs of the search are for trials on nodes that have the code alone.
    """
    if place is not None and not Path("data/shards").is_dir():
        os.chdir(inputs_of(place).name)
    task = task_of(params, values)
    here = task.params.training.workers == 0  # otherwise nobody waits for its epochs
    job = task.job(directory, on_epoch=on_epoch if here else None, report_key=uuid.uuid4().hex)
    result = train(job, sharing)
    found = {name: value for name, value in result.best["metrics"].items() if name.startswith("val/")}
    missing = [name for name in params.search.metrics if name not in found]
    if missing:
        judged = launch(
            judge, task, job.shards, result, params.evaluate, training=job.training, storage=directory, sharing=sharing
        )
        found |= {name: judged.get(name, 0.0) for name in missing}  # none where no image is classified well enough for a grid
    return found


@cache
def inputs_of(place: str) -> TemporaryDirectory[str]:
    """A folder of this process with what the stages before made."""
    folder = TemporaryDirectory(prefix="inputs-")
    pull_inputs(place, Path(folder.name))
    return folder


def judge(context: Context, task: Task, shards: str, result: Result, params: EvaluateParams) -> dict[str, float]:
    """How well the best epoch's explanations, of a guided model those guided, find what is in the validation split's images."""
    optim, guided = task.optim, None
    if isinstance(optim, GuidanceParams):
        guided = {"method": optim.attribution, "layer": optim.layer}
    with TemporaryDirectory() as folder:
        save_best(task, result, Path(folder))
        found, _ = evaluate(context, {"trial": folder}, shards, task.params.data, params, "val", guided=guided)
    explanations: dict[str, dict[str, float]] = found["models"]["trial"]["explanations"]
    names = ("guided", guided["method"]) if guided else tuple(explanations)
    scores = next((explanations[name] for name in names if name in explanations), {})
    return {f"val/{name}": value for name, value in scores.items()}
