"""The training loop: build, resume, wrap, step, check, save, evaluate, report."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.distributed import (
    Context,
    all_reduce_min,
    broadcast,
    gather,
    restore_rng_states,
    rng_states,
    seed_rank,
    to_device,
    wrap,
)
from pipelines.models.image_size import image_size_errors, pass_grey_images
from pipelines.progress import bar, epoch_line
from pipelines.storage import files
from pipelines.storage.lease import Lease, writer
from pipelines.training import checkpoints
from pipelines.training.job import (
    Directions,
    EpochRecord,
    Job,
    TrainingError,
    check_objectives,
    directions,
    is_finished,
    kept_records,
)
from pipelines.training.objective import build_objective
from pipelines.training.optim import clip_gradients, match_memory_formats, optimiser, set_learning_rate
from pipelines.training.step import compute_gradients, errors_in_one_line
from pipelines.training.validation import evaluate_split

if TYPE_CHECKING:
    from pipelines.methods.method import Method


@dataclass
class Tally:
    """One rank's sums over an epoch, of which the train metrics are means."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    skipped: int = 0

    def add(self, losses: dict[str, torch.Tensor], images: int, skipped: int) -> None:
        """Adds the mean losses of a batch of `images` images, and the number of images it left out."""
        for name, value in losses.items():
            value = value.detach().double() * images
            self.losses[name] = self.losses[name] + value if name in self.losses else value
            self.counts[name] = self.counts.get(name, 0) + images
        self.skipped += skipped

    def state(self) -> dict[str, Any]:
        """Returns the sums as plain numbers."""
        return {
            "losses": {k: float(v) for k, v in self.losses.items()},
            "counts": self.counts,
            "skipped": self.skipped,
        }


@dataclass
class Run:
    """A run in progress."""

    job: Job
    context: Context
    method: Method
    objective: nn.Module  # an `Objective`, compiled if the params say so, in DDP if there are several workers
    optimiser: torch.optim.Optimizer
    steps_per_epoch: int
    directions: Directions  # of the figures by which an epoch can be selected
    epoch: int = 0  # finished epochs
    batches: int = 0  # steps done in the current epoch
    # (workers, steps) for the steps of the current epoch that other numbers of workers have done
    earlier: list[tuple[int, int]] = field(default_factory=list)
    step: int = 0  # optimiser steps done in all
    history: list[EpochRecord] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    # The first step with a loss that is not finite. It stays on the device until a check reads it.
    first_bad: torch.Tensor = field(default_factory=lambda: torch.tensor(math.inf))
    preempted: bool = False  # True once Ray has announced the preemption of a node
    lease: Lease | None = None  # None on other ranks than 0, which do not write


def fit(context: Context, job: Job) -> list[EpochRecord]:
    """Trains `job` on this rank to its end, from its newest checkpoint if it has one; returns the history.

    Raises:
        TrainingError: the loss or a weight is not finite, the disk is full, or the params do not fit
            together.
        LeaseError: another driver has the run's directory.
    """
    with writer(job.directory, job.owner) if context.rank == 0 else nullcontext() as lease:
        run = set_up(context, job)
        run.lease = lease
        if job.optim.epochs == 0 and not run.history:
            finish_epoch(run, train_metrics={})
        while not is_finished(run.history, job.params, run.directions):
            finish_epoch(run, train_metrics=train_epoch(run))
    return run.history


def set_up(context: Context, job: Job) -> Run:
    """Returns a new run, or the run in the state of its newest checkpoint."""
    seed_rank(job.seed, 0)  # the same initial weights on every rank
    method = build_method(job)
    for module in (method.module, *method.fixed):
        module.to(context.device)
    known = check_selection(job, method)
    steps_per_epoch = len(job.batches(job, "train", context=context))
    if steps_per_epoch == 0 and job.optim.epochs > 0:
        raise TrainingError(f"{job.shards}: the train split gives no batch of {job.optim.batch_size}")

    objective = build_objective(method, job.training)
    groups = method.parameter_groups(job.optim.weight_decay)
    run = Run(job, context, method, objective, optimiser(groups, job.optim), steps_per_epoch, known)
    run.first_bad = run.first_bad.to(context.device)
    seed_rank(job.seed, context.rank + 1)  # different random numbers (dropout) on each rank
    summary = broadcast(checkpoints.newest(job.directory) if context.rank == 0 else None, context)
    if summary is not None:
        resume(run, summary)
    run.objective = wrap(objective, context)
    return run


def build_method(job: Job) -> Method:
    """Builds the method of `job`.

    Raises:
        ModelError: the model that `job.spec` describes does not take images of the data's size.
    """
    size = job.data.image_size
    with image_size_errors(job.spec, size) if job.spec else nullcontext():
        method = job.build()
        if job.spec:
            pass_grey_images(method.module, size)
    return method


def check_selection(job: Job, method: Method) -> Directions:
    """Returns the directions of the method's figures.

    Raises:
        TrainingError: `job` selects epochs by a figure that is missing or has no direction.
    """
    known = directions(method)
    check_objectives(job.params, known)
    return known


def resume(run: Run, summary: dict[str, Any]) -> None:
    """Restores `run` from the checkpoint with this summary."""
    state = checkpoints.load(run.job.directory, summary["step"])
    run.method.module.load_state_dict(state["model"])
    run.optimiser.load_state_dict(state["optimiser"])
    match_memory_formats(run.optimiser)
    run.step, run.epoch, run.batches = summary["step"], summary["epoch"], summary["batches"]
    run.history = summary["history"]
    run.earlier = [(workers, steps) for workers, steps in summary.get("earlier", [])]
    ranks, rank = state["ranks"], run.context.rank
    if len(ranks) == run.context.world_size:
        restore_rng_states(ranks[rank]["rng"], run.context.device)
        tallies = [ranks[rank]["tally"]]
    else:  # another number of workers: RNG states fit no rank, and rank 0 takes over the sums of all ranks
        seed_rank(run.job.seed, rank + 1, run.step)
        steps = run.batches - sum(steps for _, steps in run.earlier)
        run.earlier += [(len(ranks), steps)] if steps else []
        tallies = [part["tally"] for part in ranks] if rank == 0 else []
    losses, counts, skipped = merge(tallies)
    run.tally = Tally({k: torch.tensor(v, dtype=torch.float64) for k, v in losses.items()}, counts, skipped)
    run.tally.losses = to_device(run.tally.losses, run.context.device)
    if rank == 0:
        print(f"goes on from step {run.step} (epoch {run.epoch + 1}) of {run.job.directory}", flush=True)


def train_epoch(run: Run) -> dict[str, float]:
    """Trains the rest of the current epoch; returns its train metrics, over all ranks."""
    job, context = run.job, run.context
    run.objective.train()
    batches = read(run, "train", epoch=run.epoch, start_batch=run.batches, earlier=run.earlier)
    check_every = 1 if context.device.type == "cpu" else job.training.log_every  # checks wait for the GPU
    rate, images, began = 0.0, 0, time.monotonic()
    title = f"epoch {run.epoch + 1}/{job.optim.epochs}"
    with bar(title, run.steps_per_epoch, done=run.batches, show=context.rank == 0) as progress:
        for batch in rng_isolated(batches):
            loss, rate = train_step(run, batch)
            progress.update()
            images += len(batch["key"])
            if run.step % check_every == 0:
                stop_if_not_finite(run)
            if run.step % job.training.log_every == 0:
                speed = images * context.world_size / (time.monotonic() - began)
                progress.set_postfix_str(f"loss {float(loss):.4g}, {speed:.1f} images/s", refresh=False)
            due = run.step % job.training.checkpoint_every == 0 or preemption_noticed(run)
            if due and run.batches < run.steps_per_epoch:
                save(run)
    stop_if_not_finite(run)
    seconds = time.monotonic() - began
    losses, counts, skipped = merge(gather(run.tally.state(), context))
    images = sum(gather(images, context))
    run.epoch, run.batches, run.earlier, run.tally = run.epoch + 1, 0, [], Tally()
    run.method.set_progress(run.epoch)
    return {
        **{f"train/{name}": total / counts[name] for name, total in losses.items()},
        "train/lr": rate,
        "train/images_per_second": images / seconds,
        "train/skipped": float(skipped),
        **{f"train/{name}": value for name, value in run.method.epoch_metrics().items()},
    }


def read(run: Run, split: str, **start: Any) -> Any:
    """Returns this rank's batches of a split; `start` has `epoch`, `start_batch` and `earlier`."""
    return run.job.batches(run.job, split, context=run.context, fields=run.method.fields, **start)


def rng_isolated(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Iterates `batches`, restoring the RNG state after each fetch.

    A loader draws seeds when it starts, and a resumed epoch starts its loader once more than an uninterrupted
    one.
    """
    cpu = torch.device("cpu")
    states = rng_states(cpu)
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        restore_rng_states(states, cpu)
        if batch is None:
            return
        yield batch
        states = rng_states(cpu)


def preemption_noticed(run: Run) -> bool:
    """Returns True once, when a node is about to be preempted, so that a checkpoint is due.

    Ray is asked every `log_every` steps.
    """
    if run.context.preempted is None or run.preempted or run.step % run.job.training.log_every:
        return False
    run.preempted = run.context.preempted()
    return run.preempted


def train_step(run: Run, batch: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Does one optimiser step; returns the loss of this rank's images and the learning rate."""
    optim = run.job.optim
    run.method.set_progress(run.epoch + run.batches / run.steps_per_epoch)
    run.optimiser.zero_grad(set_to_none=True)
    with errors_in_one_line(run):
        losses = compute_gradients(run, batch)
        clip_gradients(run.method.module.parameters(), optim)
        rate = set_learning_rate(run.optimiser, optim, run.step, optim.epochs * run.steps_per_epoch)
        run.optimiser.step()
    loss = losses.get("loss", torch.zeros_like(run.first_bad))  # without images this rank has no losses
    run.step += 1
    run.batches += 1
    bad = torch.where(torch.isfinite(loss), math.inf, float(run.step))
    run.first_bad = torch.minimum(run.first_bad, bad.to(run.first_bad))
    run.tally.add(losses, len(batch["key"]), batch.get("skipped", 0))
    return loss, rate


def stop_if_not_finite(run: Run) -> None:
    """Raises `TrainingError` on all ranks if the loss of any rank was not finite."""
    step = all_reduce_min(run.first_bad, run.context)
    if math.isfinite(step):
        stop(run, f"the loss of step {step:.0f} (epoch {run.epoch + 1}) is not a finite number")


def stop(run: Run, cause: str) -> None:
    """Raises `TrainingError` with the cause and the checkpoint that is kept."""
    summary = checkpoints.newest(run.job.directory)
    kept = f"the checkpoint of step {summary['step']} is kept" if summary else "there is no checkpoint yet"
    raise TrainingError(f"{cause}; {kept} in {run.job.directory}")


def merge(tallies: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int], int]:
    """Adds up the losses, counts and skipped images of several tallies."""
    losses: dict[str, float] = {}
    counts: dict[str, int] = {}
    for tally in tallies:
        for name, value in tally["losses"].items():
            losses[name] = losses.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + tally["counts"][name]
    return losses, counts, sum(tally["skipped"] for tally in tallies)


def finish_epoch(run: Run, train_metrics: dict[str, float]) -> None:
    """Validates if it is due, writes the epoch's checkpoint and history, then reports."""
    job, context = run.job, run.context
    values: dict[str, float] = {}
    if run.epoch % job.optim.validate_every == 0 or run.epoch >= job.optim.epochs:
        batches = read(run, "val")
        values = evaluate_split(
            run.method, run.method.module, rng_isolated(batches), context, job.training.precision
        )
        if not values:
            stop(
                run, f"val: no image could be evaluated after epoch {run.epoch}, so no epoch can be selected"
            )
        values["skipped"] = float(sum(gather(getattr(batches, "skipped", 0), context)))
    metrics = train_metrics | {f"val/{name}": value for name, value in values.items()}
    metrics = broadcast(metrics, context)  # ranks measure different images per second
    run.history = [*run.history, EpochRecord(epoch=run.epoch, step=run.step, metrics=metrics)]
    save(run)
    if context.rank == 0:
        print(epoch_line(run.epoch, job.optim.epochs, metrics), flush=True)
        with full_disk_in_one_line(run):
            if run.lease is not None:
                run.lease.check_newest()
            files.write_json(f"{job.directory}/history.json", run.history)
            report(job, run.history)
    if context.report is not None:
        context.report({"epoch": run.epoch, "step": run.step, **metrics})


def save(run: Run) -> None:
    """Writes a checkpoint; raises `TrainingError` if a loss so far or a weight is not finite."""
    stop_if_not_finite(run)
    model = run.method.module.state_dict()
    if not all(bool(torch.isfinite(value).all()) for value in model.values() if value.is_floating_point()):
        stop(run, f"a weight is not a finite number after step {run.step} (epoch {run.epoch + 1})")
    ranks = gather({"rng": rng_states(run.context.device), "tally": run.tally.state()}, run.context)
    if run.context.rank != 0:
        return
    keep = (
        {record["step"] for record in kept_records(run.history, run.job.params, run.directions)}
        if run.history
        else set()
    )
    state = {"model": model, "optimiser": run.optimiser.state_dict(), "ranks": ranks}
    summary = {"epoch": run.epoch, "batches": run.batches, "earlier": run.earlier, "history": run.history}
    summary["directions"] = dict(run.directions)
    with full_disk_in_one_line(run):
        checkpoints.save(
            run.job.directory, run.step, state, summary, keep, run.job.training.keep_last, run.lease
        )


@contextmanager
def full_disk_in_one_line(run: Run) -> Iterator[None]:
    """Turns the error of a full disk into a `TrainingError` that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            stop(run, f"no space left to write the checkpoint of step {run.step} (epoch {run.epoch + 1})")
        raise


def report(job: Job, history: list[EpochRecord]) -> None:
    """Calls `job.on_epoch`, in order, with each record that it has not accepted yet."""
    if job.on_epoch is None:
        return
    before = files.read_record(f"{job.directory}/reported.json", dict) or {}
    taken = before.get("records", 0) if before.get("key") == job.report_key else 0
    for record in history[taken:]:
        try:
            job.on_epoch(record)
        except Exception as error:  # an error of the tracking must not stop training
            print(
                f"epoch {record['epoch']} was not reported ({type(error).__name__}: {error}); kept for later"
            )
            break
        taken += 1
        files.write_json(f"{job.directory}/reported.json", {"key": job.report_key, "records": taken})
