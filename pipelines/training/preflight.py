"""What a training can be refused for, found out before it is launched."""

from __future__ import annotations

from pipelines.distributed import Context
from pipelines.params import TrainingParams
from pipelines.training.job import Job, TrainingError
from pipelines.training.loop import build_method, check_selection


def check(job: Job) -> None:
    """Raises the error with which `job`, launched as its params say, would end before its first step.

    It launches and uploads nothing: it reads the manifest of `job.shards`, builds the method and passes images through the model.

    Raises:
        UserError: one line that names the cause.
    """
    check_batch_size(job.optim.batch_size, job.training)
    method = build_method(job)
    check_selection(job, method)
    last = job.training.most_workers
    for split in ("train", "val"):
        len(job.batches(job, split, context=Context(last - 1, last), fields=method.fields))


def check_batch_size(batch_size: int, training: TrainingParams) -> None:
    """Raises `TrainingError` if the effective batch has fewer images than there may be workers."""
    if batch_size < training.most_workers:
        raise TrainingError(
            f"batch_size {batch_size} (over all workers) is less than one image for each of up to {training.most_workers} workers"
        )
