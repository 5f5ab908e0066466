"""Stage `search`: the work of a stage many times over, with other params each time; the Pareto front in `reports/search`."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from infra.job import PLACE, Order
from infra.submit import put
from pipelines import tracking
from pipelines.evaluation.pictures import draw_front
from pipelines.params import Params, check_space, leaves
from pipelines.search.records import Trial, as_it_is, folder
from pipelines.search.tune import front, search
from pipelines.storage.files import write_json
from pipelines.workflow.running import COMPUTATION, REPORTS, Task, code_digest, seen_by_all, stage, stage_run
from pipelines.workflow.trials import check_metrics, run_trial, task_of
from stages import explain
from stages.tools.summary import searched

OUT = REPORTS / "search"
INPUTS: dict[str, tuple[str, ...]] = {  # of training, not searched
    "bcosify": ("model",),
    "distill": ("distill.shots", "distill.shots_seed", "distill.frozen"),
    "guide": (),
}
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # here -> in MLflow


def main() -> None:
    """Searches; what was on record already is not run again."""
    with stage() as params:
        check_space(params, "params.yaml: search.space")
        task = task_of(params, {})
        check_metrics(params, task)
        with stage_run(task.params, "search", *settings(params, task), upstream=task.upstream) as (run, directory):
            first = as_it_is(params)
            found = search(
                partial(run_trial, params, place_of_inputs(params, task)),
                params.search,
                params.training,
                directory,
                first=[] if first is None else [first],
                on_trial=partial(tell, params, run, directory),
            )
            best, names = front(found, params.search.metrics), params.search.metrics
            rows = [as_row(number, trial, number in best) for number, trial in enumerate(found)]
            write_json(OUT / "trials.json", rows)
            write_json(OUT / "front.json", [rows[number] for number in best])
            highest = {name: max(rows[number]["metrics"][name] for number in best) for name in names}
            write_json(OUT / "metrics.json", {**Counter(row["status"] for row in rows), "front": len(best), **highest})
            points = {row["trial"]: [row["metrics"][name] for name in names] for row in rows if row["status"] == "finished"}
            draw_front(OUT / "front.png", points, best, names)
            Console(highlight=False).print(searched(params.search.metrics, [rows[number] for number in best]))
            run.metrics(highest)
            for name in ("trials.json", "front.json", "front.png"):
                run.artifact(OUT / name)


def place_of_inputs(params: Params, task: Task) -> str | None:
    """Where trials on other nodes find what the stages before made: a job's place, or for a cluster at RAY_ADDRESS one made here.

    Without any, trials read it in this working directory.
    """
    place = os.environ.get(PLACE)
    if place is not None or not os.environ.get("RAY_ADDRESS") or not seen_by_all(params):
        return place
    storage = params.storage.root.rstrip("/")
    made = [Path("data/shards", task.params.dataset), *map(Path, task.upstream), explain.OUT]
    folders = sorted({os.path.relpath(path) for path in made if path.is_dir()})
    inputs = [item for folder in folders if (item := put(folder, storage))["names"]]
    order: Order = {"stages": [], "inputs": inputs, "environment": {}}
    place = f"{storage}/jobs/search-{uuid.uuid4().hex[:8]}"
    write_json(f"{place}/order.json", order)
    return place


def settings(params: Params, task: Task) -> tuple[Any, ...]:
    """What trials depend on besides their values: the same where a point of the search becomes the params."""
    drawn = {f"{params.search.section}.epochs", *(dimension.key for dimension in params.search.space)}
    places = (*params.search.searchable, *INPUTS[params.search.stage.partition("@")[0]])
    content = leaves(params.model_dump(mode="json"))
    fixed = {key: content[key] for key in content if key not in drawn and f"{key}.".startswith(tuple(f"{p}." for p in places))}
    how = params.search.model_dump(mode="json", exclude={"trials", "concurrency", "workers"})
    computation = params.training.model_dump(include=COMPUTATION - {"workers"})
    explanations = task.settings()[-1]
    return (fixed, how, computation, params.evaluate, explanations, code_digest(("evaluation",)))


def as_row(number: int, trial: Trial, on_front: bool) -> dict[str, Any]:
    """A trial as the reports have it."""
    epochs = trial["history"][-1]["epoch"] if trial["history"] else 0
    told = {key: trial[key] for key in ("status", "values", "metrics", "error")}
    return {"trial": number, "on_front": on_front, "epochs": epochs, **told}


def tell(params: Params, run: tracking.StageRun, directory: str, trial: Trial) -> None:
    """Says how a trial ended, here and in MLflow."""
    drawn = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in trial["values"].items())
    figures = [f"{name} {trial['metrics'][name]:.3f}" for name in params.search.metrics if name in trial["metrics"]]
    print(f"trial {trial['status']}: {', '.join(figures) or trial['error']} ({drawn})", flush=True)
    tracking.child_run(
        run,
        "search trial",
        experiment=params.tracking.experiment,
        params=trial["values"],
        directory=folder(directory, trial["values"]),
        history=trial["history"],
        metrics=trial["metrics"],
        status=STATUS[trial["status"]],
    )


if __name__ == "__main__":
    main()
