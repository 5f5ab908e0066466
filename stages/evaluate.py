"""Stage `evaluate`: all trained models on the test split, with figures and pictures in `reports/evaluate`."""

import csv
from pathlib import Path
from typing import Any

from pipelines.evaluation import evaluate_and_judge
from pipelines.gallery import draw_gallery
from pipelines.training import launch
from stages.common import REPORTS, flat, shards_of, stage, stage_run, write_json

OUT = REPORTS / "evaluate"
NAMES = {"pretrained": "bcosified", "scratch": "bcos_from_scratch"}  # of the B-cos networks, in reports


def main() -> None:
    """Evaluates the conventional model and every B-cos network of the params."""
    with stage() as params:
        folders = {"conventional": "pretrain"} | {NAMES[start]: f"bcosify/{start}" for start in params.bcosify.starts}
        directories = {name: str(Path("models", folder).absolute()) for name, folder in folders.items()}
        shards = shards_of(params.dataset)
        where = params.training.model_copy(update={"workers": params.evaluate.workers})
        with stage_run(params, "evaluate", params.data, params.evaluate, upstream=tuple(directories.values())) as (run, _):
            metrics, right = launch(evaluate_and_judge, directories, shards, params.data, params.evaluate, training=where)
            write_json(OUT / "metrics.json", metrics)
            write_plot(OUT / "localisation.csv", metrics)
            run.metrics(flat({"test": metrics["models"]}))
            run.pictures(draw_gallery(OUT / "pictures", directories, right, shards, params.data, params.evaluate))


def write_plot(path: Path, metrics: dict[str, Any]) -> None:
    """One row an explanation, for `dvc plots`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["explanation", "gridpg", "epg"])
        for model, found in metrics["models"].items():
            for name, scores in found["explanations"].items():
                label = model if name == "bcos" else f"{model}: {name}"
                writer.writerow([label, scores.get("gridpg"), scores.get("epg")])


if __name__ == "__main__":
    main()
