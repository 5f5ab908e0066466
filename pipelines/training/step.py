"""The gradients of one optimiser step, as if one rank took the whole batch at once.

Ranks share each batch, and a rank may take its share in parts (gradient accumulation). Losses are means over
images, so ranks and parts are weighted by their numbers of images.

Shapes: N images of this rank, M rows of all ranks, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.distributed import (
    Context,
    all_reduce_sum,
    average_gradients,
    gather,
    gather_rows,
    gradient_sync,
    to_device,
    unwrapped,
)
from pipelines.params import TrainingParams
from pipelines.storage.errors import one_line
from pipelines.training.job import TrainingError
from pipelines.training.objective import memory_format

if TYPE_CHECKING:
    from pipelines.training.loop import Run


@dataclass(frozen=True)
class Share:
    """A rank's share of the batch of one step."""

    images: int  # images of this rank
    total: torch.Tensor  # images of all ranks, a float32 scalar on the device
    # Factor of this rank's mean losses, which makes DDP's mean over ranks the gradient of the whole batch.
    weight: torch.Tensor | float
    idle: bool  # True if some rank has no image, because none of its images decodes


def share_of(images: int, context: Context, may_be_idle: bool) -> Share:
    """Returns this rank's share of a batch. All ranks must call it, because they add up their images.

    Args:
        images: number of images of this rank.
        context: context of this rank.
        may_be_idle: True if a rank may be without an image. The call then waits for the GPU to learn if one
            is.
    """
    total, idle_ranks = all_reduce_sum((images, images == 0), context)
    idle = may_be_idle and bool(idle_ranks > 0)
    weight = images * context.world_size / total if context.world_size > 1 else 1.0
    return Share(images, total, weight, idle)


def compute_gradients(run: Run, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Computes the gradients of a batch of the loader; returns the losses of this rank's images.

    Gradients are the same on all ranks. A rank without images returns no losses.

    Raises:
        TrainingError: no image of the batch decodes on any rank.
    """
    share = share_of(len(batch["key"]), run.context, may_be_idle=run.job.data.on_error == "skip")
    if share.idle and not share.total > 0:
        raise TrainingError(
            f"no image of step {run.step} (epoch {run.epoch + 1}) decodes (data.on_error: skip)"
        )
    prepared = prepare_batch(run, batch, share) if share.images else {}
    all_rows = exchange(run, prepared, share)
    losses = gradients(run, prepared, share, all_rows) if share.images else {}
    if share.idle:
        average_gradients(run.method.module, run.context)
    return losses


def prepare_batch(run: Run, batch: dict[str, Any], share: Share) -> dict[str, torch.Tensor]:
    """Returns the arguments of the method's loss for a batch of the loader, see `Method.prepare`."""
    device, precision = run.context.device, run.job.training.precision
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        more = {"step": run.step, "step_images": share.total, "parts": parts_of(run, share.images)}
        return run.method.prepare({**to_device(batch, device), **more})


def exchange(run: Run, batch: dict[str, torch.Tensor], share: Share) -> dict[str, torch.Tensor]:
    """Returns `all_NAME` (M, ...), the rows of all ranks, for each tensor NAME that the method shares.

    Adds `row` (N,) to `batch`, see `Method.loss`. All ranks take part, also a rank whose `batch` is empty.
    Rows are gathered once per step, before the first part of the batch. So ranks may take different numbers
    of parts, the compiler sees no collective, and DDP's collectives come later.

    Each rank then holds the rows of the whole batch. A ring would hold the rows of one rank at a time. But it
    would go round once per part, inside the forward pass, and ranks with fewer parts or without images would
    have to join each round. The rows are small: embeddings of 1,024 numbers from 300 ranks take as much
    memory as the images (6, 224, 224) of this rank.
    """
    found: dict[str, torch.Tensor] = {}
    room = -(-run.job.optim.batch_size // run.context.world_size)
    for name in getattr(run.method, "shared", ()):
        rows = batch.get(name)
        if share.idle:  # a rank without images does not know the shape of a row
            empty = [
                each
                for each in gather(None if rows is None else rows[:0].cpu(), run.context)
                if each is not None
            ]
            rows = empty[0].to(run.context.device) if rows is None else rows
        assert rows is not None
        found[f"all_{name}"], first = gather_rows(rows, run.context, room)
        if share.images:
            batch["row"] = torch.arange(first, first + share.images, device=rows.device)
    return found


def gradients(
    run: Run,
    batch: dict[str, torch.Tensor],
    share: Share | None = None,
    all_rows: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Computes the gradients of a prepared batch; returns its losses without their graph.

    The batch is taken in parts, weighted by their numbers of images. The gradient is that of the whole batch,
    unless a module computes statistics over a batch: BatchNorm normalises by the statistics of a part.

    Args:
        run: the run, whose objective is used.
        batch: prepared batch of this rank.
        share: this rank's share of the step; `None` if there is no other rank.
        all_rows: tensors that each part gets whole, see `exchange`.
    """
    training, device = run.job.training, run.context.device
    batch = {name: in_memory_format(value, memory_format(training)) for name, value in batch.items()}
    count = len(next(iter(batch.values())))
    pieces = {name: value.tensor_split(parts_of(run, count)) for name, value in batch.items()}
    parts = [
        dict(zip(pieces, values, strict=True)) | (all_rows or {})
        for values in zip(*pieces.values(), strict=True)
    ]
    # DDP would wait for the idle rank, so `compute_gradients` averages the gradients afterwards instead.
    objective = unwrapped(run.objective) if share is not None and share.idle else run.objective
    weight = 1.0 if share is None else share.weight
    statistics = RunningStatistics(run.method.module) if len(parts) > 1 else None
    total: dict[str, torch.Tensor] = {}
    for number, part in enumerate(parts, start=1):
        of_part = len(next(iter(part.values()))) / count
        with (
            gradient_sync(objective, number == len(parts)),
            statistics.part(of_part) if statistics else nullcontext(),
        ):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bfloat16"):
                losses = objective(part)
            (losses["loss"] * (of_part * weight)).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + of_part * value.detach()
    if statistics:
        statistics.settle()
    return total


def parts_of(run: Run, images: int) -> int:
    """Returns the number of parts in which this rank takes its `images` images of a batch."""
    return min(images, parts_per_worker(run.job.training, run.job.optim.batch_size, run.context.world_size))


def parts_per_worker(training: TrainingParams, batch_size: int, world_size: int) -> int:
    """Returns the number of parts in which each of `world_size` workers takes its share of a batch.

    The largest number of workers takes `training.accumulate` parts. Fewer workers take more parts, but no
    larger ones. The parts have equal sizes, so that compiled code sees one size, unless that takes at
    least twice as many parts.
    """
    if world_size >= training.most_workers:
        return training.accumulate
    share = -(-batch_size // world_size)
    least = -(-share // training.largest_part(batch_size))
    return next((parts for parts in range(least, 2 * least) if share % parts == 0), least)


class RunningStatistics:
    """Updates a module's running statistics once per batch, although the batch is taken in parts.

    Each part starts from the statistics before the batch. `settle` sets them to the mean over the parts,
    weighted by images. For BatchNorm this is (1 - momentum)·before + momentum·(mean of the parts'
    statistics). The batch counts once in `num_batches_tracked`.
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name.rpartition(".")[2], buffer) for name, buffer in module.named_buffers()]
        self._counts = [buffer for name, buffer in named if name == "num_batches_tracked"]
        self._buffers = [buffer for name, buffer in named if name.startswith("running_")]
        self._before = [buffer.clone() for buffer in (*self._buffers, *self._counts)]
        self._moved = [torch.zeros_like(buffer) for buffer in self._buffers]

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Wraps the forward and backward pass of a part that has this share of the batch's images."""
        with torch.no_grad():
            for buffer, before in zip((*self._buffers, *self._counts), self._before, strict=True):
                buffer.copy_(before)
        yield
        with torch.no_grad():
            for buffer, before, moved in zip(self._buffers, self._before, self._moved, strict=False):
                moved.add_(buffer - before, alpha=share)

    @torch.no_grad()
    def settle(self) -> None:
        """Sets the statistics to their values after the whole batch."""
        for buffer, before, moved in zip(self._buffers, self._before, self._moved, strict=False):
            buffer.copy_(before + moved)


@contextmanager
def errors_in_one_line(run: Run) -> Iterator[None]:
    """Turns compiler errors, and too little GPU memory in the first step, into `TrainingError`."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = one_line(str(error).partition("\n\n")[0])
        raise TrainingError(f"compile: {cause} (compile: false trains without the compiler)") from error
    except torch.OutOfMemoryError as error:
        if run.step > 0:  # the memory did suffice: another process may have taken some for a while
            raise
        known = (
            f"accumulate: {run.job.training.accumulate}, "
            f"checkpoint_activations: {run.job.training.checkpoint_activations}"
        )
        cause = one_line(error).partition(". ")[0]
        raise TrainingError(
            f"the first step does not fit the GPU ({known}; both can spare memory): {cause}"
        ) from error


def in_memory_format(value: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Returns `value`, in the memory format `layout` if it is a batch of images (4 dimensions)."""
    return value.contiguous(memory_format=layout) if value.ndim == 4 else value
