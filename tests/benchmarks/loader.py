"""Images a second that the loader gives, against those that a training step takes: which of the two limits a run.

    dvc repro shard && python -m tests.benchmarks.loader [--workers 0 1 2] [--threads 2] [--batches 40]

Reads the shards and params of the run at hand, with the training transform; the step is that of `bcosify.pretrained` (forward and
backward pass, clipping, optimiser), with channels first and last in turns. Prints one line of JSON for each number of decoding
processes; `loader` reads what this method reads, `loader_all_fields` boxes and masks too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pipelines  # noqa: F401  (first: it says how threads wait)

import torch  # isort: skip

from pipelines.data.loader import FIELDS
from pipelines.data.manifest import read_manifest
from pipelines.methods import build_bcosification
from pipelines.params import Params, load
from pipelines.training import Job
from pipelines.training.distributed import Context
from pipelines.training.job import shard_batches
from pipelines.training.loop import set_up, train_step
from stages.common import shards_of, spec_of


def job_of(params: Params, workers: int, directory: str) -> Job:
    """The job of B-cosifying a network of random weights, with that many decoding processes."""
    optim, shards = params.bcosify.pretrained, shards_of(params.dataset)
    spec = spec_of(params, read_manifest(shards), kind="bcos", design=optim.design())
    return Job(
        build=partial(build_bcosification, spec, None, optim, 0),
        shards=shards,
        data=params.data.model_copy(update={"loader_workers": workers}),
        optim=optim,
        training=params.training.model_copy(update={"workers": 0}),
        seed=0,
        directory=directory,
    )


def rate(batches: Any, count: int) -> tuple[float, list[dict[str, Any]]]:
    """Images a second over `count` batches after the first, and the batches."""
    iterator = iter(batches)
    kept = [next(iterator)]
    start = time.perf_counter()
    kept += itertools.islice(iterator, count)
    return sum(len(batch["key"]) for batch in kept[1:]) / (time.perf_counter() - start), kept


def step_rates(params: Params, batches: list[dict[str, Any]], rounds: int = 3) -> dict[str, float]:
    """Images a second of the step, by the memory format of images and convolutions; medians of rounds in turns."""
    runs, seconds = {}, {}
    for name in ("first", "last"):
        job = job_of(params, 0, str(Path("runs/loader_benchmark", name).absolute()))
        training = job.training.model_copy(update={"channels_last": name == "last"})
        runs[name] = set_up(Context(), replace(job, training=training))
        runs[name].objective.train()
        train_step(runs[name], dict(batches[0]))
        seconds[name] = []
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for batch in batches[1:]:
                train_step(run, dict(batch))
            seconds[name].append(time.perf_counter() - start)
    images = sum(len(batch["key"]) for batch in batches[1:])
    return {name: images / statistics.median(of_name) for name, of_name in seconds.items()}


def main() -> None:
    """Measures the loader with each number of processes, with all fields of a sample too, and the step in both layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    params = load()
    lines, batches = [], []
    for workers in options.workers:
        job = job_of(params, workers, "")
        found, batches = rate(shard_batches(job, "train"), options.batches)
        every, _ = rate(shard_batches(job, "train", fields=sorted(FIELDS)), options.batches)
        lines.append({"loader_workers": workers, "loader": round(found), "loader_all_fields": round(every)})
    steps = step_rates(params, batches)
    for line in lines:
        layouts = {f"step_channels_{name}": round(value) for name, value in steps.items()}
        print(json.dumps({**line, **layouts, "loader_by_step": round(line["loader"] / steps["last"], 2)}))


if __name__ == "__main__":
    main()
