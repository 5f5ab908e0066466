"""The trials of the stage `search`: the searched stage with other params. Also the search's reports."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from pipelines import tracking
from pipelines.attribution import Attribution
from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.distributed import Context
from pipelines.evaluation import evaluate, figures
from pipelines.evaluation.pictures import draw_front
from pipelines.metrics import rising, with_arrows
from pipelines.params import EvaluateParams, GuidanceParams, Params, ParamsError, keyed, replaced
from pipelines.search.records import Trial, trial_directory
from pipelines.search.tune import front
from pipelines.storage.files import write_json
from pipelines.training import EpochRecord, Result, TrainingError, launch, train
from pipelines.training.job import directions
from pipelines.workflow.places import REPORTS
from pipelines.workflow.reports import trials_table, what_a_search_shows
from pipelines.workflow.sharing import shards_for_all
from pipelines.workflow.submitted_job import Input, enter_inputs
from pipelines.workflow.tasks import TASKS, Task
from pipelines.workflow.training import save_best

CODE = ("pipelines.workflow.trials",)  # the module that computes a trial
OUT = REPORTS / "search"
UNMEASURED = {  # metric -> why a trial may have no value of it
    "val/gridpg": "too few classes have an image that the network gets right with confidence, "
    "so there is no grid",
    **dict.fromkeys(
        ("val/epg", "val/size_corrected_epg", "val/iou", "val/iou_at_0.5"),
        "no map has energy, or no box a pixel",
    ),
}
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # status of a trial -> of its run


def task_of(params: Params, values: Mapping[str, Any]) -> Task:
    """Returns the searched stage's task with `values` in its params, and epochs and workers of a trial."""
    of_trials = {
        params.search.epochs_key: params.search.epochs,
        "training.workers": params.search.workers,
    }
    stage, _, which = params.search.stage.partition("@")
    task = TASKS[stage](
        replaced(params, of_trials | dict(values), "search.space"), *([which] if which else [])
    )
    if params.search.shots is None:
        return task
    with keyed("search", params.search):
        subset = few_shot(shards_for_all(task.params), "train", params.search.shots, params.search.seed)
    return replace(task, subset=subset)


def with_measurable_metrics(params: Params, task: Task) -> Params:
    """Returns `params` with the metrics of the search that trials can measure on this data.

    If the data has fewer classes than a grid shows, `val/gridpg` is dropped and a printed line says so.

    Raises:
        ParamsError: a metric is unknown, it is not known whether it should rise or fall, or no metric is
            left.
    """
    known = directions(task.build())
    each_epoch = [
        name for name, direction in known.items() if name.startswith("val/") and direction is not None
    ]
    manifest, cells = read_manifest(task.job("").shards), params.evaluate.grid_size**2
    of_boxes = ["val/epg", "val/size_corrected_epg", "val/iou", "val/iou_at_0.5"]
    boxed = task.spec.task != "embedding" and "boxes" in manifest.fields.get("val", ())
    at_the_end = ["val/gridpg"] * (task.spec.task == "multiclass") + of_boxes * boxed
    for number, name in enumerate(params.search.metrics):
        halves = number == 0 and params.search.asha is not None
        allowed = each_epoch if halves else dict.fromkeys([*each_epoch, *at_the_end])
        if known.get(name, True) is None:
            raise ParamsError(
                f"search.metrics: it is not known whether {name!r} should rise or fall; "
                f"take {', '.join(allowed)}"
            )
        if name not in allowed:
            which = "the first one, by which search.asha judges each epoch, can be" if halves else "there are"
            raise ParamsError(f"search.metrics: no metric {name!r}; {which} {', '.join(allowed)}")
    classes = len(task.spec.classes)
    left = [name for name in params.search.metrics if name != "val/gridpg" or classes >= cells]
    if left != params.search.metrics:
        cause = (
            f"val/gridpg cannot be measured: a grid shows {cells} classes (evaluate.grid_size), "
            f"the data has {classes}"
        )
        if not left:
            raise ParamsError(f"search.metrics: {cause}")
        print(f"search.metrics: {cause}; trials are chosen by {', '.join(left)}", flush=True)
    return params.model_copy(update={"search": params.search.model_copy(update={"metrics": left})})


def run_trial(
    params: Params,
    inputs: Sequence[Input] | None,
    values: dict[str, Any],
    directory: str,
    on_epoch: Callable[[EpochRecord], None],
    sharing: int,
) -> dict[str, float]:
    """Trains with `values` and returns the validation metrics of the best epoch, without unmeasured ones.

    `inputs` are the inputs of the search, for trials on nodes that only have the code. The other arguments
    are those of `pipelines.search.tune.Work`.
    """
    enter_inputs(inputs)
    task = task_of(params, values)
    here = task.params.training.workers == 0  # `on_epoch` is only for trials that train in this process
    job = task.job(directory, on_epoch=on_epoch if here else None, report_key=uuid.uuid4().hex)
    with keyed(task.section, task.method), keyed("training", task.params.training):
        result = train(job, sharing)
    found = {name: value for name, value in result.best["metrics"].items() if name.startswith("val/")}
    missing = [name for name in params.search.metrics if name not in found]
    if missing:
        arguments = (task, job.shards, result, params.evaluate)
        judged = launch(judge, *arguments, training=job.training, storage=directory, sharing=sharing)
        found |= {name: judged[name] for name in missing if name in judged}
    return found


def judge(
    context: Context, task: Task, shards: str, result: Result, params: EvaluateParams
) -> dict[str, float]:
    """Returns localisation scores of the best epoch's explanations on the validation split.

    For a guided model the explanations are those that were guided.
    """
    method, guided = task.method, None
    if isinstance(method, GuidanceParams):
        guided = Attribution(method.attribution, method.layer)
    with TemporaryDirectory() as model:
        save_best(task, result, Path(model))
        where = (shards, task.params.data, params, "val")
        found = figures(evaluate(context, {"trial": model}, *where, guided=guided))
    explanations: dict[str, dict[str, float]] = found["models"]["trial"]["explanations"]
    names = ("guided", guided.method) if guided else tuple(explanations)
    scores = next((explanations[name] for name in names if name in explanations), {})
    return {f"val/{name}": value for name, value in scores.items()}


def track_trial(params: Params, run: tracking.StageRun, directory: str, trial: Trial) -> None:
    """Prints how a trial ended, and logs it to MLflow as a child of the search's run."""
    drawn = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in trial["values"].items())
    metrics = params.search.metrics
    figures = [f"{name} {trial['metrics'][name]:.3f}" for name in metrics if name in trial["metrics"]]
    if trial["status"] == "finished":
        figures += [
            f"{name} not measured ({UNMEASURED.get(name, 'it had no case')})"
            for name in _without(trial, metrics)
        ]
    print(f"trial {trial['status']}: {', '.join(figures) or trial['error']} ({drawn})", flush=True)
    tracking.child_run(
        run,
        "search trial",
        experiment=params.tracking.experiment,
        params=trial["values"],
        directory=trial_directory(directory, trial["values"]),
        history=trial["history"],
        metrics=trial["metrics"],
        status=STATUS[trial["status"]],
    )


def _without(trial: Trial, metrics: Sequence[str]) -> list[str]:
    """Returns those of `metrics` that the trial has not measured."""
    return [name for name in metrics if name not in trial["metrics"]]


def report_search(run: tracking.StageRun, found: Sequence[Trial], names: Sequence[str]) -> None:
    """Reports the trials and their Pareto front in `reports/search`, in MLflow and on the console.

    Raises:
        TrainingError: no finished trial has measured any of the metrics `names`. The reports are written
            before that.
    """
    finished = [trial for trial in found if trial["status"] == "finished"]
    unmeasured = [name for name in names if all(name in _without(trial, names) for trial in finished)]
    known = [name for name in names if name not in unmeasured]
    best = front(found, known) if known else []
    rows: list[dict[str, Any]] = [
        {
            "trial": number,
            "on_front": number in best,
            "epochs": trial["history"][-1]["epoch"] if trial["history"] else 0,
            **{key: value for key, value in trial.items() if key in ("status", "values", "metrics", "error")},
        }
        for number, trial in enumerate(found)
    ]
    of_front = [rows[number] for number in best]
    values = {name: [row["metrics"][name] for row in of_front if name in row["metrics"]] for name in known}
    best_values = {name: max(some, key=partial(rising, name)) for name, some in values.items()}
    write_json(OUT / "trials.json", rows)
    write_json(OUT / "front.json", of_front)
    write_json(
        OUT / "metrics.json", {**Counter(row["status"] for row in rows), "front": len(best), **best_values}
    )
    points = {
        row["trial"]: [row["metrics"].get(name) for name in known]
        for row in rows
        if row["status"] == "finished"
    }
    shows = what_a_search_shows(len(rows))
    draw_front(OUT / "front.png", points, best, with_arrows(known), note=shows)
    for name in unmeasured:
        print(f"{name} was measured in no trial: {UNMEASURED.get(name, 'it had no case')}", flush=True)
    if not known:
        raise TrainingError(
            f"search.metrics: no trial has measured {' or '.join(names)}; the trials are in {OUT}/trials.json"
        )
    Console(highlight=False).print(trials_table(known, of_front, len(rows)))
    run.metrics(best_values)
    run.tag("search.shows", shows)
    for name in ("trials.json", "front.json", "front.png"):
        run.artifact(OUT / name)
