"""Finds operations of a network that are non-linear in the image and not held in explanation mode.

Conversion replaces modules. It cannot see an expression such as `torch.sigmoid(x) * x` in the `forward` of a
block: this factor is not held, and W(x) is wrong without an error. `audit` runs the network once in
explanation mode, with parameters as constants, and reads the graph that autograd has recorded between image
and logits. Factors are detached, so they are not in this graph, and all operations that are in it must be
linear or piecewise linear in the image.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.bcos.errors import ConversionError
from pipelines.bcos.explanation import Explanation, explaining, recording, usable

# Operations that are linear, or piecewise linear, jointly in all their tensors. Names are those of autograd's
# nodes in snake case. Operations with an upper limit (ReLU6, clamp) are missing: above the limit they give a
# constant that no pixel carries, whereas a gate limit/x could be held.
LINEAR = frozenset({
    "add", "sub", "rsub", "neg", "sum", "mean", "cumsum", "cat", "stack", "clone", "copy", "to_copy", "alias",
    "fill", "zero", "view", "unsafe_view", "reshape_alias", "as_strided", "expand", "permute", "transpose",
    "t", "squeeze", "unsqueeze", "select", "slice", "split", "split_with_sizes", "unsafe_split",
    "unsafe_split_with_sizes", "unbind", "diagonal", "tril", "triu", "unfold", "slice_scatter",
    "select_scatter", "index", "index_select", "index_put", "index_add", "index_copy", "gather", "scatter",
    "scatter_add", "masked_fill", "masked_scatter", "masked_select", "where", "roll", "flip", "rot90",
    "repeat", "repeat_interleave", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d", "max_unpool2d", "native_dropout",
    "upsample_nearest2d", "upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_bilinear2d_aa", "im2_col", "col2_im", "pixel_shuffle", "pixel_unshuffle",
    "native_channel_shuffle", "relu", "leaky_relu", "threshold", "clamp_min", "abs", "max", "min", "amax",
    "amin", "maximum", "minimum", "sort", "topk", "accumulate_grad",
})  # fmt: skip

# Piecewise constant operations: their gradient is 0.
FLAT = frozenset({"sign", "round", "floor", "ceil", "trunc", "bernoulli"})

# Operations that are linear in each of these inputs if the other one is constant.
PRODUCTS = {
    "mul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "linear": (0, 1),
    "convolution": (0, 1),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "addbmm": (1, 2),
    "baddbmm": (1, 2),
    "addcmul": (1, 2),
}

# Operations that are linear if this input is constant.
CONSTANT = {"div": 1, "addcdiv": 2, "lerp": 2, "prelu_kernel": 1, "grid_sampler2d": 1}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Operations in the `forward` of one module that are neither linear in the image nor held."""

    path: str  # dotted name of the module; empty for the network itself
    type: str  # class name of the module
    operations: tuple[str, ...]  # in the order of execution

    def __str__(self) -> str:
        return f"{', '.join(self.operations)} in the forward of {self.type} at {self.path or 'the top'!r}"


def audit(network: nn.Module, images: Tensor) -> list[Finding]:
    """Operations of `network` that are non-linear in the image and that explanation mode does not hold.

    Args:
        network: B-cos network of `convert` or `bcosify`, in training or evaluation mode. Parameters, buffers
            and the random state are left untouched.
        images: (N, 6, H, W) in [0, 1]; two small images are enough.

    Returns:
        One finding per module, in the order of execution; an empty list if there are none. Code that does not
        run for these images is not audited.
    """
    calls: list[tuple[int, int, str]] = []
    writes = _Writes()
    with (
        recording(),
        _untouched(network),
        _noting(network, calls),
        explaining(network, Explanation(detach=True)),
        writes,
    ):
        logits = network(usable(images).detach().requires_grad_())
    found: dict[str, list[str]] = {}
    for node, outputs in sorted(_graph(logits.grad_fn).items(), key=lambda item: item[0]._sequence_nr()):
        number, operation = node._sequence_nr(), _operation(node.name())
        operation = writes.at.get(number, operation) if operation == "copy_slices" else operation
        if not _is_linear(operation, [parent is not None for parent, _ in _parents(node)], outputs):
            operations = found.setdefault(_innermost(calls, number), [])
            if operation not in operations:
                operations.append(operation)
    return [
        Finding(path, type(network.get_submodule(path)).__name__, tuple(names))
        for path, names in found.items()
    ]


def check_held(network: nn.Module, images: Tensor) -> None:
    """Raises ConversionError if `audit`, which takes the same arguments, finds operations."""
    findings = audit(network, images)
    if findings:
        types = ", ".join(dict.fromkeys(finding.type for finding in findings))
        raise ConversionError(
            f"explanation mode cannot hold {'; '.join(map(str, findings))}: "
            f"write a rule with @register_conversion for {types} "
            "that passes each factor through Holdable.hold"
        )


def _is_linear(operation: str, depends: list[bool], outputs: set[int]) -> bool:
    """Returns True if an operation is (piecewise) linear in the image.

    `depends` says which of its inputs depend on the image, `outputs` are the indices of those of its outputs
    that are used.
    """
    if operation in PRODUCTS:
        return sum(depends[place] for place in PRODUCTS[operation] if place < len(depends)) <= 1
    if operation in CONSTANT:
        return not any(depends[CONSTANT[operation] : CONSTANT[operation] + 1])
    if operation == "var_mean":
        return outputs == {1}  # only the mean is used
    return operation in LINEAR


def _operation(node: str) -> str:
    """Converts the name of a node: `MaxPool2DWithIndicesBackward0` -> `max_pool2d_with_indices`."""
    name = re.sub(r"Backwards?\d*$", "", node.rpartition("::")[2])
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"(?<=\d)D", "d", name)).lower()


def _parents(node: Any) -> list[tuple[Any, int]]:
    """The node that made each input of `node` and the output's index; `None` for image-independent inputs."""
    return [
        (None, 0) if parent is None or _operation(parent.name()) in FLAT else (parent, number)
        for parent, number in node.next_functions
    ]


def _graph(last: Any) -> dict[Any, set[int]]:
    """All nodes of autograd's graph from `last` back to the image -> the indices of their used outputs."""
    used: dict[Any, set[int]] = {}
    left = [(last, 0)]
    while left:
        node, output = left.pop()
        if node is None:
            continue
        if node not in used:
            left.extend(_parents(node))
        used.setdefault(node, set()).add(output)
    return used


def _innermost(calls: list[tuple[int, int, str]], number: int) -> str:
    """Dotted name of the innermost module that was running when autograd made its node `number`.

    `calls` are (first number, end, name) in the order in which calls ended, so nested calls come before the
    calls around them.
    """
    return next((path for first, end, path in calls if first <= number < end), "")


class _Writes(TorchDispatchMode):
    """Notes in-place operations by the number of autograd's next node.

    The graph shows an in-place operation on a view only as a node `CopySlices`, which is made right after the
    operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.at[torch.autograd._get_sequence_nr()] = func._schema.name.removeprefix("aten::").rstrip("_")
        return func(*args, **(kwargs or {}))


@contextmanager
def _noting(network: nn.Module, calls: list[tuple[int, int, str]]) -> Iterator[None]:
    """Context manager that appends (first node number, end, module name) to `calls` when a call ends."""
    begun: list[int] = []
    number = torch.autograd._get_sequence_nr
    hooks = []
    for path, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_: begun.append(number())))
        hooks.append(
            module.register_forward_hook(lambda *_, path=path: calls.append((begun.pop(), number(), path)))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """Context manager without gradients of parameters; restores `requires_grad`, buffers and random state."""
    required = {parameter: parameter.requires_grad for parameter in network.parameters()}
    buffers = {buffer: buffer.clone() for buffer in network.buffers()}
    try:
        network.requires_grad_(False)
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, require in required.items():
            parameter.requires_grad_(require)
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
