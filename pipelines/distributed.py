"""Operations of several workers: seeds, gathers, reductions, DistributedDataParallel.

All of them also work for a single worker without a process group.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.process import cpu_count


@dataclass(frozen=True)
class Context:
    """Where a function runs: its rank among `world_size` workers, and its device.

    Attributes:
        report: passes metrics to Ray Train or Tune; called on all ranks.
        preempted: returns True if a node of the workers is about to be taken away; called on all ranks.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[dict[str, Any]], None] | None = None
    preempted: Callable[[], bool] | None = None


def use_threads(local_world_size: int) -> None:
    """Sets torch's threads to a worker's equal share of the cores; sums are then the same after a restart."""
    torch.set_num_threads(max(1, cpu_count() // local_world_size))


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seeds this process's generators (python, numpy, torch, CUDA), differently per rank and step."""
    value = int(numpy.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def rng_states(device: torch.device) -> dict[str, Any]:
    """States of this process's generators, in types that `torch.load(weights_only=True)` accepts."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng_states(states: dict[str, Any], device: torch.device) -> None:
    """Restores the states that `rng_states` returned."""
    kind, keys, position, has_gauss, gauss = states["numpy"]
    random.setstate(states["python"])
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def wrap(objective: nn.Module, context: Context) -> nn.Module:
    """Wraps `objective` in DistributedDataParallel if there are several workers.

    On the CPU, `find_unused_parameters` is on, because it keeps DDP from rebuilding its gradient buckets
    after a process's first step. With rebuilt buckets, the first step of a resumed run would sum gradients in
    another order than a run that was never killed, and with three or more workers the last bits would differ.
    """
    if context.world_size == 1 or not any(parameter.requires_grad for parameter in objective.parameters()):
        return objective
    if context.device.type == "cuda":
        return DistributedDataParallel(objective, device_ids=[context.device])
    return DistributedDataParallel(objective, find_unused_parameters=True)


def unwrapped(objective: nn.Module) -> nn.Module:
    """`objective` without the DistributedDataParallel around it."""
    return objective.module if isinstance(objective, DistributedDataParallel) else objective


def gradient_sync(objective: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Context in which backward passes average gradients over the workers only if `wanted`."""
    return (
        nullcontext() if wanted or not isinstance(objective, DistributedDataParallel) else objective.no_sync()
    )


def gather(value: Any, context: Context) -> list[Any]:
    """Returns every rank's `value`, ordered by rank, on every rank."""
    if context.world_size == 1:
        return [value]
    values: list[Any] = [None] * context.world_size
    dist.all_gather_object(values, value)
    return values


def gather_rows(tensor: torch.Tensor, context: Context, room: int) -> tuple[torch.Tensor, int]:
    """Concatenates all ranks' rows (n, ...), without gradient; returns them and this rank's first row.

    Each rank fills `room` rows of the result (world_size·room, ...): its n <= `room` rows (n may be 0), then
    zeros. The shape is therefore the same in every step, as compiled code needs, and no rank waits for its
    GPU to learn how many rows the others have.
    """
    own = tensor.detach().new_zeros(room, *tensor.shape[1:])
    own[: len(tensor)] = tensor.detach()
    if context.world_size == 1:
        return own, 0
    rows = own.new_empty(context.world_size * room, *own.shape[1:])
    dist.all_gather_into_tensor(rows, own)
    return rows, context.rank * room


def broadcast(value: Any, context: Context) -> Any:
    """Returns rank 0's `value` on every rank."""
    if context.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_buffers(module: nn.Module, context: Context) -> None:
    """Sets every rank's buffers (running statistics) to rank 0's, as DDP does before a training step."""
    if context.world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def all_reduce_min(value: torch.Tensor, context: Context) -> float:
    """Minimum of all ranks' `value` (a scalar tensor, reduced in place)."""
    if context.world_size > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return float(value)


def all_reduce_sum(values: Sequence[float], context: Context) -> torch.Tensor:
    """Sums of all ranks' `values`: float32, on the device of `context`; does not wait for a GPU."""
    sums = torch.stack(
        [torch.full((), value, dtype=torch.float32, device=context.device) for value in values]
    )
    if context.world_size > 1:
        dist.all_reduce(sums)
    return sums


def average_gradients(module: nn.Module, context: Context) -> None:
    """Averages gradients over the ranks, for steps in which DDP cannot because a rank has no gradients.

    A missing gradient counts as 0. Parameters without a gradient on every rank keep `None`.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if context.world_size == 1 or not parameters:
        return
    used = torch.tensor(
        [float(parameter.grad is not None) for parameter in parameters], device=context.device
    )
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for parameter in (
        parameter for parameter, somewhere in zip(parameters, used.tolist(), strict=True) if somewhere
    ):
        mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        mean = mean.contiguous()
        dist.all_reduce(mean)
        parameter.grad = torch.empty_like(parameter).copy_(mean / context.world_size)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Moves tensors of `batch` to `device`, except `boxes`: selecting rows on a GPU would wait for it."""
    tensors = {
        name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "boxes"
    }
    return batch | {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
