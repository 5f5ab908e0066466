"""What training can be refused for, found out before its first step, and before a launch without a worker."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from pipelines.distributed import Context
from pipelines.models.image_size import image_size_errors, pass_grey_images
from pipelines.params import TrainingParams
from pipelines.training.job import Job, TrainingError

if TYPE_CHECKING:
    from pipelines.methods.method import Method


def check(job: Job) -> None:
    """Raises the error with which `job`, launched as its params say, would end before its first step.

    It launches and uploads nothing: it reads the manifest of `job.shards`, builds the method and passes images through the model.

    Raises:
        UserError: one line that names the cause.
    """
    check_batch_size(job.optim.batch_size, job.training)
    method = build_method(job)
    last = job.training.most_workers
    for split in ("train", "val"):
        len(job.batches(job, split, context=Context(last - 1, last), fields=method.fields))


def check_batch_size(batch_size: int, training: TrainingParams) -> None:
    """Raises `TrainingError` if the effective batch has fewer images than there may be workers."""
    if batch_size < training.most_workers:
        raise TrainingError(
            f"batch_size {batch_size} (over all workers) is less than one image for each of up to {training.most_workers} workers"
        )


def build_method(job: Job) -> Method:
    """The method of `job`, whose model takes images of the data's size.

    Raises:
        ModelError: the model takes no such images.
        TrainingError: a metric by which epochs are chosen is none of the method.
    """
    size = job.data.image_size
    with image_size_errors(job.spec, size) if job.spec else nullcontext():
        method = job.build()
        if job.spec:
            pass_grey_images(method.module, size)
    check_selection(job, method)
    return method


def check_selection(job: Job, method: Method) -> None:
    """Raises `TrainingError` where an objective is neither one of the training nor an evaluation metric of the method."""
    names = [f"val/{name}" for name in method.metrics()] + ["train/loss"]
    for objective in job.optim.objectives:
        if objective not in names and not objective.startswith("train/"):
            raise TrainingError(f"select: no metric {objective!r}; there are {', '.join(names)}")
