"""Images per second of the data loader, of a training step, and of both together.

    dvc repro shard && python -m benchmarks.loader [--workers 0 1 2] [--threads 2] [--batches 40]

Reads the shards of the current params.yaml with its training transform. The step is that of
`bcosify.pretrained` (forward and backward pass, clipping, optimiser), with the device, precision and
compilation of the section `training`. Prints one line of JSON per number of decoding processes (`--workers`):

- `loader`: the loader, with the fields that the method reads;
- `loader_all_fields`: the loader with all fields, including boxes and masks;
- `step_channels_first`, `step_channels_last`: the step on ten batches that are in memory, in turns, medians
  of three rounds;
- `together`: steps on batches of the loader, as in the training loop, with channels last;
- `loader_by_step`: `loader` / `step_channels_last`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import clock
from pipelines.data.loading.batch import FIELDS
from pipelines.distributed import Context
from pipelines.methods import build_bcosification
from pipelines.params import Params, load, replaced
from pipelines.training import Job
from pipelines.training.job import shard_batches
from pipelines.training.loop import Run, read, rng_isolated, set_up, train_step
from pipelines.workflow import tasks


def job_of(params: Params, layout: str) -> Job:
    """The job that B-cosifies a network of random weights, with channels `first` or `last`."""
    params = replaced(params, {"training.workers": 0, "training.channels_last": layout == "last"})
    task, optim = tasks.bcosify(params, "pretrained"), params.bcosify.pretrained
    directory = str(Path("runs/loader_benchmark", layout).absolute())
    return replace(
        task.job(directory), build=partial(build_bcosification, task.spec, None, optim, params.seed)
    )


def rate(batches: Any, count: int) -> float:
    """Images per second over `count` batches that follow the first."""
    iterator = iter(batches)
    next(iterator)
    start = clock()
    images = sum(len(batch["key"]) for batch in itertools.islice(iterator, count))
    return images / (clock() - start)


def stepped(run: Run, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Iterates `batches` and yields each batch after a training step on it."""
    for batch in batches:
        train_step(run, batch)
        yield batch


def step_rates(runs: dict[str, Run], batches: list[dict[str, Any]], rounds: int = 3) -> dict[str, float]:
    """Images per second of each run's step on batches in memory: medians of rounds in turns."""
    turns = [
        {name: rate(stepped(run, batches), len(batches)) for name, run in runs.items()} for _ in range(rounds)
    ]
    return {name: statistics.median(turn[name] for turn in turns) for name in runs}


def main() -> None:
    """Measures the step in both layouts, and per number of processes the loader, alone and with the step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    params = load()
    context = Context(device=torch.device("cuda" if params.training.gpus_per_worker else "cpu"))
    runs = {layout: set_up(context, job_of(params, layout)) for layout in ("first", "last")}
    for run in runs.values():
        run.objective.train()
    run = runs["last"]
    some = list(itertools.islice(shard_batches(run.job, "train", context=context), 10))
    steps = {f"step_channels_{name}": round(value) for name, value in step_rates(runs, some).items()}
    for workers in options.workers:
        run.job = replace(run.job, data=run.job.data.model_copy(update={"loader_workers": workers}))
        every = shard_batches(run.job, "train", context=context, fields=sorted(FIELDS))
        found = {
            "loader": round(rate(read(run, "train"), options.batches)),
            "loader_all_fields": round(rate(every, options.batches)),
            **steps,
            "together": round(rate(stepped(run, rng_isolated(read(run, "train"))), options.batches)),
        }
        by_step = round(found["loader"] / steps["step_channels_last"], 2)
        print(json.dumps({"loader_workers": workers, **found, "loader_by_step": by_step}), flush=True)


if __name__ == "__main__":
    main()
