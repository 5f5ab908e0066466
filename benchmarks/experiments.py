"""Trains a stage of the workflow with several params and seeds, and compares the results.

    dvc exp run -S recipe=cifar10 ... pretrain      # sets params.yaml, makes the inputs of the stage
    python -m benchmarks.experiments bcosify@pretrained --run b=2 --run bias=decay bias_decay=10
    python -m benchmarks.experiments distill@kd --split test --seeds 0 1 2 --run explanation_weight=10
    python -m benchmarks.experiments guide --seeds 0 1 2 --run loss=energy localisation_weight=0.1

Each `--run` lists changes to params.yaml: `key=value` for the stage's own params, `data.crop_padding=2` for
others. A seed determines the initial weights, the order of the data, the images per class (`distill.shots`),
and the images with boxes (`guide.guided.annotated`). For `guide`, the classifier of each seed is trained
first; frozen explanations are stored first.

The best epoch of each run is evaluated on the split; a guided model is explained by the attribution that
guided it. Results are lines of JSON in `reports/experiments.jsonl`, and runs that have a line there are not
repeated. Prints means ± standard deviations over the seeds, as the pages of results in docs have them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.markdown import table
from pipelines import evaluation, models
from pipelines.attribution import Attribution
from pipelines.data.shards.manifest import read_manifest
from pipelines.distributed import Context
from pipelines.params import DistillationParams, GuidanceParams, Params, replaced
from pipelines.storage.paths import run_directory
from pipelines.training import train
from pipelines.workflow import identity, tasks
from pipelines.workflow.places import REPORTS, STORED_EXPLANATIONS, model_folder, shards_of
from pipelines.workflow.running import stage
from pipelines.workflow.storing import store
from pipelines.workflow.tasks import TASKS, Task
from pipelines.workflow.training import save_best

SECTIONS = {  # stage -> section of params.yaml
    **{f"bcosify@{start}": f"bcosify.{start}" for start in ("pretrained", "scratch")},
    "distill@kd": "distill.kd",
    "guide": "guide.guided",
}
SEEDS = ("seed", "distill.shots_seed", "guide.guided.annotated_seed")
RESULTS = REPORTS / "experiments.jsonl"
FIGURES = (
    *(
        "accuracy",
        "f1",
        "worst_group_accuracy",
        "mean_group_accuracy",
        "worst_class_group_accuracy",
        "agreement",
    ),
    *(
        "explanation_similarity",
        "gridpg_own_grids",
        "unexplained_share",
        "unexplained_share_as_published",
        "epg",
    ),
    *("iou", "iou_threshold", "iou_at_0.5"),
    *(
        "on_object_epg",
        "size_corrected_epg",
        "epg_small",
        "epg_medium",
        "epg_large",
        "train/b_mean",
        "train/bias_abs_mean",
    ),
    *("teacher_accuracy", "teacher_f1", "teacher_epg", "teacher_iou", "teacher_iou_at_0.5"),
)


def measure(params: Params, name: str, split: str) -> dict[str, Any]:
    """The stage's line of figures for these params and `split`; trains and evaluates it if there is none."""
    task = prepared(params, name)
    directory = directory_of(task)
    lines = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.is_file() else ()
    for line in lines:
        if (line["directory"], line["split"]) == (directory, split):
            return line
    result, folder = train(task.job(directory)), Path("models/experiments", Path(directory).name)
    save_best(task, result, folder)
    about = {"directory": directory, "split": split, "model": str(folder), "epoch": result.best["epoch"]}
    line = about | result.best["metrics"] | figures(task, folder, split)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        print(json.dumps(line), file=file)
    return line


def prepared(params: Params, name: str) -> Task:
    """Makes the inputs of the stage (classifier of this seed, teacher's maps), and returns its task."""
    kind, _, item = name.partition("@")
    if kind == "guide":
        classifier = tasks.classify(params)
        result = train(classifier.job(directory_of(classifier)))
        shutil.rmtree(model_folder("classify"), ignore_errors=True)  # may be a link into DVC's cache
        save_best(classifier, result, model_folder("classify"))
    if kind == "distill" and params.distill.kd.explanations == "frozen":
        STORED_EXPLANATIONS.mkdir(parents=True, exist_ok=True)
        store(params, STORED_EXPLANATIONS)
    return TASKS[kind](params, *filter(None, [item]))


def directory_of(task: Task) -> str:
    """The folder of the task's checkpoints, named by a hash of everything that the outcome depends on."""
    origin = (
        read_manifest(shards_of(task.params.dataset)).digest,
        *(models.digest(folder) for folder in task.upstream),
    )
    return run_directory(task.params.storage.root, "experiments", *identity.of_training(task), *origin)


def figures(task: Task, folder: Path, split: str) -> dict[str, float]:
    """Evaluation figures of the model in `folder` and, with the prefix `teacher_`, of a student's teacher."""
    method, guided, folders, teacher = task.method, None, {"model": str(folder)}, None
    if isinstance(method, GuidanceParams):
        guided = Attribution(method.attribution, method.layer)
    if isinstance(method, DistillationParams):
        teacher, folders["teacher"] = "teacher", str(model_folder("teacher"))
    where = (shards_of(task.params.dataset), task.params.data, task.params.evaluate, split)
    found = evaluation.figures(evaluation.evaluate(Context(), folders, *where, teacher, guided))
    flat: dict[str, float] = {}
    for name, of_model in found["models"].items():
        explanations, prefix = of_model.pop("explanations"), "teacher_" if name == teacher else ""
        scores = explanations.get("guided", explanations.get(guided.method if guided else "bcos", {}))
        flat |= {f"{prefix}{key}": value for key, value in (of_model | scores).items()}
    return flat


def summary(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown table of the means ± standard deviations over the seeds of each run."""
    shown = [name for name in FIGURES if any(name in line for lines in runs.values() for line in lines)]
    rows = []
    for run, lines in runs.items():
        cells = [spread([line[name] for line in lines if line.get(name) is not None]) for name in shown]
        rows.append([run, len(lines), *cells])
    return table(["run", "seeds", *shown], rows)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the mean alone for one value, empty for none."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}" if values else ""


def main() -> None:
    """Measures the runs of the command line with each seed, and prints their summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=SECTIONS)
    parser.add_argument(
        "--run", nargs="+", action="append", metavar="KEY=VALUE", help="by default the params as they are"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=("val", "test"), default="val")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with stage() as base:
        for seed, run in itertools.product(options.seeds, options.run or [[]]):
            pairs = (change.split("=", 1) for change in run)
            values = {
                key
                if key.partition(".")[0] in Params.model_fields
                else f"{SECTIONS[options.stage]}.{key}": yaml.safe_load(value)
                for key, value in pairs
            }
            params = replaced(base, {"training.workers": 0, **dict.fromkeys(SEEDS, seed), **values}, "--run")
            runs.setdefault(" ".join(run) or "params.yaml", []).append(
                measure(params, options.stage, options.split)
            )
    print(summary(runs))


if __name__ == "__main__":
    main()
