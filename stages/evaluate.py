"""Stage `evaluate`: all models on the test split, with figures and pictures in `reports/evaluate`."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.data.shards.manifest import read_manifest
from pipelines.evaluation import evaluate_and_judge
from pipelines.evaluation.gallery import draw_gallery
from pipelines.models import load_published, save
from pipelines.params import Params, ParamsError
from pipelines.storage.files import write_json
from pipelines.training import launch
from pipelines.workflow.running import REPORTS, flat, models_for_all, shards_for_all, shards_of, stage, stage_run

OUT = REPORTS / "evaluate"
NAMES = {"pretrained": "bcosified", "scratch": "bcos_from_scratch"}  # of the B-cos networks, in reports
STUDENTS = ("teacher", "kd", "e2kd")
# In reports, and of the tracked run's inputs.
OWN_NAMES = {"conventional", *NAMES.values(), *STUDENTS, "shards", "pretrain", *NAMES}


def main() -> None:
    """Evaluates the conventional model, every B-cos network of the params, and the published ones that they name; then students.

    Students are evaluated beside their teacher, on grids of their own, so that they do not decide on which grids the others are.
    """
    with stage() as params:
        folders = {"conventional": "pretrain"} | {NAMES[start]: f"bcosify/{start}" for start in params.bcosify.starts}
        directories, shards = in_models(folders), shards_for_all(params)
        directories = published_models(params, read_manifest(shards_of(params.dataset)).classes) | directories
        students = in_models({"teacher": "teacher"} | {run: f"distill/{run}" for run in params.distill.runs})
        where = params.training.model_copy(update={"workers": params.evaluate.workers})
        both = (*directories.values(), *students.values())
        with stage_run(params, "evaluate", params.data, params.evaluate, upstream=both, context="evaluation") as (run, _):
            judge = partial(launch, evaluate_and_judge, training=where, storage=params.storage.root)
            metrics, right = judge(models_for_all(params, directories), shards, params.data, params.evaluate)
            student_models = models_for_all(params, students)
            of_students, students_right = judge(student_models, shards, params.data, params.evaluate, "test", "teacher")
            write_json(OUT / "metrics.json", metrics)
            write_json(OUT / "students.json", of_students)
            write_plot(OUT / "localisation.csv", metrics["models"] | of_students["models"])
            run.metrics(flat({"test": metrics["models"], "students": of_students["models"]}))
            run.pictures(draw_gallery(OUT / "pictures", directories, right, shards, params.data, params.evaluate))
            draw_gallery(OUT / "student_pictures", students, students_right, shards, params.data, params.evaluate)


def in_models(folders: dict[str, str]) -> dict[str, str]:
    """Name -> absolute path of the folder in `models`."""
    return {name: str(Path("models", folder).absolute()) for name, folder in folders.items()}


def published_models(params: Params, classes: Sequence[str]) -> dict[str, str]:
    """Folders of the published networks, by name, made here from their checkpoints; `classes` are those of the data."""
    folders = {}
    for name, published in params.evaluate.published.items():
        if name in OWN_NAMES:
            raise ParamsError(f"evaluate.published.{name}: something of this run has that name already: give it another")
        model, spec = load_published(published.name, published.weights, classes=tuple(classes), sha256=published.sha256)
        folder = Path("models/published", name).absolute()
        save(folder, model, spec)
        folders[name] = str(folder)
    return folders


def write_plot(path: Path, models: dict[str, Any]) -> None:
    """One row an explanation, for `dvc plots`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["explanation", "gridpg", "epg"])
        for model, found in models.items():
            for name, scores in found["explanations"].items():
                label = model if name == "bcos" else f"{model}: {name}"
                writer.writerow([label, scores.get("gridpg"), scores.get("epg")])


if __name__ == "__main__":
    main()
