"""The losses of a method as one module, and what is done to it from outside: memory format, compilation, checkpointing."""

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

# Code compiled for this run is this run's alone, where torch can do so (from 2.13 on).
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)
BATCH_SIZES = 64  # that are compiled, each on its own; `data.on_error: skip` makes batches shorter


class Objective(nn.Module):
    """A prepared batch of tensors -> named losses; what DDP wraps and torch.compile compiles.

    So a method's `loss` always has the module itself, never a wrapped one.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.module = method.module
        self.method = method

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The named scalars of the method's `loss`."""
        return self.method.loss(self.module, batch)


def build_objective(method: Method, training: TrainingParams) -> Objective:
    """The objective of `method`, laid out, checkpointed and compiled as `training` says; its module keeps its parameters' names.

    Raises:
        TrainingError: `checkpoint_activations` of a module without blocks.
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
    """The memory format of images and convolutions. The compiler's convolutions have channels last, and copy other formats."""
    return torch.channels_last if training.channels_last or training.compile else torch.contiguous_format


def compile_objective(objective: Objective) -> None:
    """Compiles `objective` in place.

    What is compiled is a function of the batch at hand (no symbolic shapes once a batch was shorter, no falling back to eager
    code once many were) and, where torch can, of this run alone: so a resumed run computes what one never killed does.
    """
    set_up_compiler()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BATCH_SIZES)
    objective.compile(dynamic=False, **ISOLATED)


def checkpoint_blocks(module: nn.Module) -> None:
    """Makes the blocks of `module` keep only their inputs in training, and compute the rest again in the backward pass.

    Blocks are the members of an `nn.Sequential` or `nn.ModuleList`, at any depth, that are neither one themselves nor a layer.
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
    """The blocks of `checkpoint_blocks`, none inside another."""
    for child in module.children():
        listed = isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(
            child, nn.Sequential | nn.ModuleList
        )
        if listed and next(child.children(), None) is not None:
            yield child
        else:
            yield from blocks(child)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` of `block`, its activations dropped where a backward pass will follow."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    states = hold_states(block)
    second = partial(_second_pass, block, states[0].explanation if states else None)
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Reusable(second)), **kwargs
    )


class _Reusable(AbstractContextManager[Any]):
    """What `make` gives, made anew each time: W(x) in a loss takes two backward passes, and each computes again."""

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
    """In the block, what is computed is what the first pass computed, and what is written to buffers is lost.

    `explanation` is the one of the first pass: a backward pass that computes again may come when its explanation mode has ended.
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
