"""Checks of a job that find, before it is launched, why its training would fail."""

from __future__ import annotations

from pipelines.distributed import Context
from pipelines.params import TrainingParams
from pipelines.training.job import Job, TrainingError
from pipelines.training.loop import build_method, check_selection


def check(job: Job) -> None:
    """Raises the error with which `job` would fail before its first step.

    Reads the manifest of `job.shards`, builds the method and passes images through the model. Launches and
    uploads nothing.

    Raises:
        UserError: the message, one line, names the cause.
    """
    check_batch_size(job.optim.batch_size, job.training)
    method = build_method(job)
    check_selection(job, method)
    last = job.training.most_workers
    for split in ("train", "val"):
        len(job.batches(job, split, context=Context(last - 1, last), fields=method.fields))


def check_batch_size(batch_size: int, training: TrainingParams) -> None:
    """Raises `TrainingError` if the effective batch has fewer images than the largest number of workers."""
    if batch_size < training.most_workers:
        raise TrainingError(
            f"batch_size {batch_size} (over all workers) is less than one image "
            f"for each of up to {training.most_workers} workers"
        )
