"""What each design choice of B-cosification is worth: the default recipe with one choice changed at a time, on held-out images.

    dvc exp run -S recipe=cifar10 -S model.weights=FILE pretrain          # shards, and the conventional model
    python -m benchmarks.design_choices [--only bias_keep ...] [--seeds 0 1 2] [--epochs 2] [--threads 1]

Each choice is trained for the same few epochs from the conventional model in `models/pretrain`, and evaluated on the validation
split: accuracy, grid pointing game (on the model's own grids), unexplained share of the published and of the mean-referenced map.
One line of JSON each goes to `reports/design_choices.jsonl`; what is there already is not run again. `--table` prints them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pipelines  # noqa: F401  (first: it says how threads wait)

import torch  # isort: skip

from pipelines import models
from pipelines.data.shards.manifest import read_manifest
from pipelines.distributed import Context
from pipelines.evaluation import evaluate
from pipelines.methods import build_bcosification
from pipelines.params import BcosificationParams, Params, load
from pipelines.storage.paths import run_directory
from pipelines.training import Job, train
from pipelines.workflow.running import shards_of, spec_of

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "b_scheduled": {"b_mode": "scheduled", "b_start": 1.0, "b_epochs": 1},
    "b_learned": {"b_mode": "learned", "b_start": 2.0, "b_decay": 1.0},
    "b_learned_from_1": {"b_mode": "learned", "b_start": 1.0, "b_decay": 1.0},
    "bias_decay": {"bias": "decay", "bias_decay": 10.0},
    "bias_keep": {"bias": "keep"},
    "random": {"normalize_weight": True, "lr": 0.003},
    "random_max_out": {"normalize_weight": True, "lr": 0.003, "max_out": 2},
    "no_gap_reorder": {"gap_reorder": False},
    "norm_centered": {"norm": "centered"},
}
RESULTS = Path("reports/design_choices.jsonl")


def measure(params: Params, name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Trains one choice from one seed and evaluates it on the validation split."""
    optim = BcosificationParams(**{**params.bcosify.pretrained.model_dump(), "epochs": epochs, **CHOICES[name]})
    shards = shards_of(params.dataset)
    spec = spec_of(params, read_manifest(shards), kind="bcos", design=optim.design())
    source = None if optim.normalize_weight else Path("models/pretrain").absolute()
    job = Job(
        build=partial(build_bcosification, spec, source, optim, seed),
        shards=shards,
        data=params.data,
        optim=optim,
        training=params.training.model_copy(update={"workers": 0}),
        seed=seed,
        directory=run_directory(params.storage.root, "design_choices", params.dataset, optim, seed),
    )
    result = train(job)
    module = job.build().module
    result.load_last(module)
    directory = Path("models/design_choices", f"{name}-{seed}")
    models.save(directory, module, spec)
    found, _ = evaluate(Context(), {name: str(directory)}, shards, params.data, params.evaluate, "val")
    of_model, last = found["models"][name], result.history[-1]["metrics"]
    explained = of_model["explanations"]["bcos"]
    return {
        "choice": name,
        "seed": seed,
        "epochs": epochs,
        "accuracy": of_model["accuracy"],
        "gridpg": explained["gridpg_own_grids"],
        **{key: value for key, value in explained.items() if key.startswith("unexplained")},
        "b_mean": last["train/b_mean"],
        "bias_abs_mean": last.get("train/bias_abs_mean"),
    }


def rows() -> list[dict[str, Any]]:
    """What has been measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table() -> str:
    """Means (and standard deviations, of several seeds) as markdown."""
    explained = [key for key in rows()[0] if key == "gridpg" or key.startswith("unexplained")]
    columns = ["accuracy", *explained, "b_mean", "bias_abs_mean"]
    lines = ["| choice | seeds | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name in dict.fromkeys(row["choice"] for row in rows()):
        of_choice = [row for row in rows() if row["choice"] == name]
        cells = []
        for column in columns:
            values = [row[column] for row in of_choice if row[column] is not None]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        lines.append(f"| {name} | {len(of_choice)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures the choices asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CHOICES, nargs="+", default=list(CHOICES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in options.seeds:
        for name in () if options.table else options.only:
            if not any((row["choice"], row["seed"], row["epochs"]) == (name, seed, options.epochs) for row in rows()):
                line = json.dumps(measure(load(), name, seed, options.epochs))
                with RESULTS.open("a") as file:
                    print(line, file=file)
                print(line, flush=True)
    print(table())


if __name__ == "__main__":
    main()
