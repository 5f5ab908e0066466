"""A method's losses as one module, with its memory format, compilation and activation checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelines.bcos.explanation import Explanation, explaining, hold_states
from pipelines.bcos.fused import set_up_compiler
from pipelines.params import TrainingParams
from pipelines.training.job import TrainingError

if TYPE_CHECKING:
    from pipelines.methods.method import Method

# From torch 2.13 on, a run does not share its compiled code with other runs in the process.
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)
# Number of batch sizes that may be compiled: `data.on_error: skip` makes some batches shorter.
BATCH_SIZES = 64


class Objective(nn.Module):
    """Computes the named losses of a prepared batch.

    DDP wraps and torch.compile compiles this module, so that a method's `loss` always gets `method.module`
    itself.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.module = method.module
        self.method = method

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.method.loss(self.module, batch)


def build_objective(method: Method, training: TrainingParams) -> Objective:
    """Builds the objective of `method`, with memory format, checkpointing and compilation of `training`.

    The names of the module's parameters stay the same.

    Raises:
        TrainingError: `checkpoint_activations` is set for a module without blocks.
    """
    objective = Objective(method)
    for module in (objective, *method.fixed):
        module.to(memory_format=memory_format(training))
    if training.checkpoint_activations:
        checkpoint_blocks(method.module)
    if training.compile:
        compile_objective(objective)
        for module in method.fixed:
            module.compile(dynamic=False)
    return objective


def memory_format(training: TrainingParams) -> torch.memory_format:
    """Returns the memory format of images and convolutions.

    It is channels-last if `training.compile` is set, because compiled convolutions copy other formats to it.
    """
    return torch.channels_last if training.channels_last or training.compile else torch.contiguous_format


def compile_objective(objective: Objective) -> None:
    """Compiles `objective` in place, so that a resumed run computes the same as an uninterrupted one.

    The code that runs depends on the current batch only, not on earlier ones. After a shorter batch the
    compiler does not change to symbolic shapes. It falls back to eager code only after BATCH_SIZES batch
    sizes. See also `ISOLATED`.
    """
    set_up_compiler()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BATCH_SIZES)
    objective.compile(dynamic=False, **ISOLATED)


def checkpoint_blocks(module: nn.Module) -> None:
    """Makes the blocks of `module` keep only their inputs and recompute the rest in the backward pass.

    Blocks are members of an `nn.Sequential` or `nn.ModuleList`, at any depth, that have children and are not
    an `nn.Sequential` or `nn.ModuleList` themselves.

    Raises:
        TrainingError: the module has no blocks.
    """
    found = list(blocks(module))
    if not found:
        raise TrainingError(
            f"checkpoint_activations: {type(getattr(module, 'body', module)).__name__} has no blocks "
            "(members of an nn.Sequential or nn.ModuleList that have layers of their own)"
        )
    for block in found:
        block.forward = partial(_checkpointed, block, block.forward)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the blocks of `checkpoint_blocks`, the outermost if they are nested."""
    for child in module.children():
        listed = isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(
            child, nn.Sequential | nn.ModuleList
        )
        if listed and next(child.children(), None) is not None:
            yield child
        else:
            yield from blocks(child)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `forward` of `block`, without keeping activations if a backward pass of training may follow."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    states = hold_states(block)
    second = partial(_second_pass, block, states[0].explanation if states else None)
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Reusable(second)), **kwargs
    )


class _Reusable(AbstractContextManager[Any]):
    """Context manager that enters a new context of `make` each time, so that it can be entered repeatedly.

    A loss on W(x) takes two backward passes, and each recomputes the block.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> Any:
        self._entered.append(self._make())
        return self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


@contextmanager
def _second_pass(block: nn.Module, explanation: Explanation | None) -> Iterator[None]:
    """Lets `block` recompute its first pass, and discards what the recomputation writes to buffers.

    `explanation` is that of the first pass, whose explanation mode may have ended before the backward pass.
    """
    kept = [(module, dict(module._buffers)) for module in block.modules() if module._buffers]
    try:
        for module, buffers in kept:
            module._buffers.update(
                {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}
            )
        with explaining(block, explanation):
            yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
