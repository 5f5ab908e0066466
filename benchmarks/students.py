"""What students learn from a B-cosified teacher: plain distillation, e²KD live and frozen, over seeds, on the run's data.

    dvc exp run -S recipe=cifar10 -S model.name=resnet32 -S model.weights=FILE ... bcosify@pretrained      # the teacher
    python -m benchmarks.students --choose                   # two settings of each way, on the held-out images, one seed
    python -m benchmarks.students --shots 50 200 --seeds 0 1 2 --runs kd:0:1 live:10:1 frozen:10:1   # on the test split

A run is `name:λ:τ`, or `name:λ:τ:pixels` with another `crop_padding`; what else is trained how, `distill` of the params says. A
seed draws the student's weights, the order of the images, and which ones of a class are taken (`--shots 0`: all). `--full`
evaluates as the stage `evaluate` does: grids, boxes and groups too. One line of JSON each goes to `reports/students.jsonl`; what
is there already is not run again. `--table` prints means and standard deviations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pipelines  # noqa: F401  (first: it says how threads wait)

import torch  # isort: skip
from torch import Tensor

from pipelines import models
from pipelines.bcos import add_inverse, dynamic_weights
from pipelines.data.loading.loader import loader
from pipelines.data.loading.subsets import Subset, few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.stored_explanations import INDEX
from pipelines.evaluation import evaluate
from pipelines.methods import build_e2kd
from pipelines.methods.stored_explanations import origin_of, store_explanations
from pipelines.metrics import agreement
from pipelines.metrics.agreement import explanation_similarity
from pipelines.params import DistillationParams, Params, load
from pipelines.storage.paths import run_directory
from pipelines.training import Context, Job, train
from pipelines.workflow.running import shards_of, student_spec

RESULTS = Path("reports/students.jsonl")
FIGURES = (
    *("accuracy", "f1", "worst_class_group_accuracy", "agreement", "explanation_similarity", "gridpg_own_grids"),
    *("epg", "on_object_epg", "iou", "teacher_epg", "teacher_iou"),
)
CHOICES = ("kd:0:1", "kd:0:5", "live:5:1", "live:10:1", "frozen:5:1", "frozen:10:1")  # two settings for each way


def measure(params: Params, teacher: Path, run: str, shots: int, seed: int, split: str, full: bool) -> dict[str, Any]:
    """Trains one student and evaluates its best epoch on `split`."""
    name, weight, temperature, *padding = run.split(":")
    data = params.data.model_copy(update={"crop_padding": int(padding[0])}) if padding else params.data
    values = {
        "explanation_weight": float(weight),
        "temperature": float(temperature),
        "explanations": "frozen" if name == "frozen" else "live",
        "validate_every": 10 if shots else 1,
    }
    optim = DistillationParams(**{**params.distill.kd.model_dump(), **values})
    shards = shards_of(params.dataset)
    spec = student_spec(params, read_manifest(shards), models.read_spec(teacher))
    subset = few_shot(shards, "train", shots, seed) if shots else None
    inputs = (models.digest(teacher), read_manifest(shards).digest, data, params.distill.student, optim, shots, seed)
    job = Job(
        build=partial(build_e2kd, params.distill.student, spec, teacher, optim, seed),
        shards=shards,
        data=data,
        optim=optim,
        training=params.training.model_copy(update={"workers": 0}),
        seed=seed,
        directory=run_directory(params.storage.root, "students", *inputs),
        subset=None if subset is None else subset.numbers,
        explanations=stored(params, teacher, shards, subset) if name == "frozen" else None,
    )
    result = train(job)
    module = job.build().module
    result.load_best(module)
    if full:
        folder = Path("models/students", f"{run.replace(':', '-')}-{shots}-{seed}")
        models.save(folder, module, spec)
        figures = judge_fully({"teacher": str(teacher), "student": str(folder)}, params, shards, split)
    else:
        figures = judge(module.eval(), teacher, params, shards, split)
    return {"run": run, "shots": shots, "seed": seed, "split": split, "epoch": result.best["epoch"], **figures}


def stored(params: Params, teacher: Path, shards: str, subset: Subset | None) -> str:
    """The teacher's explanations of the subset, in a folder that is made where there is none of their origin yet."""
    origin = origin_of(str(teacher), shards, params.data, params.distill.frozen, "bcos")
    which = "all" if subset is None else f"{subset.shots}-{subset.seed}"
    folder = Path(run_directory("data", "students", asdict(origin), which)).absolute()
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        numbers = None if subset is None else subset.numbers
        store_explanations(Context(), str(teacher), shards, params.data, origin, str(folder), numbers)
    return str(folder)


def judge(student: torch.nn.Module, taught_by: Path, params: Params, shards: str, split: str) -> dict[str, float]:
    """Accuracy, agreement with the teacher, and the mean cosine of both dynamic weights of what the teacher predicts."""
    teacher, _ = models.load(taught_by)
    found: dict[str, list[Tensor]] = {"labels": [], "student": [], "teacher": [], "similarity": []}
    for batch in loader(shards, split, params.data, params.evaluate.batch_size):
        images = add_inverse(batch["image"])
        taught, teacher_maps = dynamic_weights(teacher, images)
        logits, maps = dynamic_weights(student, images, taught.argmax(1))
        for key, value in zip(found, (batch["label"], logits, taught, explanation_similarity(maps, teacher_maps)), strict=True):
            found[key].append(value)
    labels, logits, taught, similarity = (torch.cat(values) for values in found.values())
    return {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "agreement": float(agreement(logits, taught)),
        "explanation_similarity": float(similarity.double().mean()),
        "teacher_accuracy": float((taught.argmax(1) == labels).double().mean()),
    }


def judge_fully(pair: dict[str, str], params: Params, shards: str, split: str) -> dict[str, float]:
    """Every figure of the student that the stage `evaluate` has, and the teacher's, prefixed `teacher_`."""
    of_models = evaluate(Context(), pair, shards, params.data, params.evaluate, split, "teacher")[0]["models"]
    figures = {}
    for prefix, name in (("", "student"), ("teacher_", "teacher")):
        found = of_models[name]
        figures |= {
            prefix + key: value for key, value in (found | found["explanations"]["bcos"]).items() if key != "explanations"
        }
    return figures


def rows() -> list[dict[str, Any]]:
    """What has been measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table() -> str:
    """Means ± standard deviations as markdown."""
    figures = [name for name in FIGURES if all(name in row for row in rows())]
    lines = ["| split | shots | run | seeds | " + " | ".join(figures) + " |", "| --- " * (4 + len(figures)) + "|"]
    for split, shots, run in sorted({(row["split"], row["shots"], row["run"]) for row in rows()}):
        same = [row for row in rows() if (row["split"], row["shots"], row["run"]) == (split, shots, run)]
        cells = []
        for name in figures:
            values = [row[name] for row in same]
            cells.append(f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""))
        lines.append(f"| {split} | {shots} | {run} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures the runs asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="the settings of CHOICES, on the held-out images, seed 0")
    parser.add_argument("--shots", type=int, nargs="+", default=[50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=[], help="name:λ:τ[:pixels], name one of kd, live, frozen")
    parser.add_argument("--teacher", type=Path, default=Path("models/bcosify/pretrained"), help="folder of the model")
    parser.add_argument("--full", action="store_true", help="evaluate as the stage does")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    runs, split = (options.runs or CHOICES, "val") if options.choose else (options.runs, "test")
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in options.seeds:
        for shots in options.shots:
            for run in () if options.table else runs:
                if not any((row["run"], row["shots"], row["seed"], row["split"]) == (run, shots, seed, split) for row in rows()):
                    line = json.dumps(measure(load(), options.teacher.absolute(), run, shots, seed, split, options.full))
                    with RESULTS.open("a") as file:
                        print(line, file=file)
                    print(line, flush=True)
    print(table())


if __name__ == "__main__":
    main()
