"""Images a second that the loader gives, against those that a training step takes: which of the two limits a run.

    dvc repro shard && python -m tests.benchmarks.loader [--workers 0 1 2] [--threads 2] [--batches 40]

Reads the shards and params of the run at hand, with the training transform; the step is that of `bcosify.pretrained` (forward and
backward pass, clipping, optimiser). Prints one line of JSON for each number of decoding processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pipelines  # noqa: F401  (first: it says how threads wait)

import torch  # isort: skip

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


def main() -> None:
    """Measures the loader with each number of processes, and the step once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    params = load()
    rates = {}
    for workers in options.workers:
        rates[workers], batches = rate(shard_batches(job_of(params, workers, ""), "train"), options.batches)
    run = set_up(Context(), job_of(params, 0, str(Path("runs/loader_benchmark").absolute())))
    run.objective.train()
    train_step(run, batches[0])
    start = time.perf_counter()
    for batch in batches[1:]:
        train_step(run, batch)
    step = sum(len(batch["key"]) for batch in batches[1:]) / (time.perf_counter() - start)
    for workers, found in rates.items():
        print(
            json.dumps(
                {"loader_workers": workers, "loader": round(found), "step": round(step), "loader_by_step": round(found / step, 2)}
            )
        )


if __name__ == "__main__":
    main()
