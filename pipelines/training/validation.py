"""A method's metrics over one pass of batches, on any number of workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.distributed import Context, broadcast_buffers, to_device
from pipelines.metrics import measured

if TYPE_CHECKING:
    from pipelines.methods.method import Method


@torch.no_grad()
def evaluate_split(
    method: Method,
    module: nn.Module,
    batches: Iterable[dict[str, Any]],
    context: Context,
    precision: str = "float32",
) -> dict[str, float]:
    """Returns the method's metrics of `module` in evaluation mode, over the batches of all ranks.

    `module` must not be wrapped by DDP, and returns to its former mode. Ranks may have different numbers of
    batches, also 0, because torchmetrics gathers its states only at the end. The values are the same on every
    rank. Metrics without any case (NaN) are left out.
    """
    training = module.training
    broadcast_buffers(module, context)
    module.eval()
    metrics = method.metrics().to(context.device)
    with torch.autocast(context.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        for batch in batches:
            method.update(metrics, module, to_device(batch, context.device))
    module.train(training)
    return measured(metrics.compute())
