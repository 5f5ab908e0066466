"""Finds the functions in a network's forward passes that depend on the image non-linearly and that nothing holds.

The conversion replaces modules. It cannot see `torch.sigmoid(x) * x` in the forward pass of a block: its factor is not held, and
W(x) would be wrong without an error. `audit` runs the network once in explanation mode, with parameters as constants, and reads
the graph that autograd recorded between image and logits. Held factors are no part of this graph, so its operations must be
linear in the image, or piecewise linear.
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

# Linear, or piecewise linear, in all their tensors together; names as in autograd's graph, in snake case. What is cut off above
# (ReLU6, clamp) is not among them: beyond the limit it is a constant that no pixel carries, where a gate limit/x could be held.
LINEAR = frozenset({
    "add", "sub", "rsub", "neg", "sum", "mean", "cumsum", "cat", "stack", "clone", "copy", "to_copy", "alias", "fill", "zero",
    "view", "unsafe_view", "reshape_alias", "as_strided", "expand", "permute", "transpose", "t", "squeeze", "unsqueeze", "select",
    "slice", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind", "diagonal", "tril", "triu",
    "unfold", "slice_scatter", "select_scatter", "index", "index_select", "index_put", "index_add", "index_copy", "gather",
    "scatter", "scatter_add", "masked_fill", "masked_scatter", "masked_select", "where", "roll", "flip", "rot90", "repeat",
    "repeat_interleave", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool2d_with_indices",
    "adaptive_max_pool2d", "max_unpool2d", "native_dropout", "upsample_nearest2d", "upsample_nearest_exact2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_bilinear2d_aa", "im2_col", "col2_im", "pixel_shuffle",
    "pixel_unshuffle", "native_channel_shuffle", "relu", "leaky_relu", "threshold", "clamp_min", "abs", "max", "min", "amax",
    "amin", "maximum", "minimum", "sort", "topk", "accumulate_grad",
})  # fmt: skip

# Constant on each of their pieces: they pass no gradient on.
FLAT = frozenset({"sign", "round", "floor", "ceil", "trunc", "bernoulli"})

# Linear in each of these inputs as long as the others are constants.
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

# Linear as long as this input is a constant.
CONSTANT = {"div": 1, "addcdiv": 2, "lerp": 2, "prelu_kernel": 1, "grid_sampler2d": 1}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Operations in the forward pass of one module that W(x) takes for linear, and that are not."""

    path: str  # of the module, dotted; empty for the network itself
    type: str
    operations: tuple[str, ...]  # in the order of execution

    def __str__(self) -> str:
        return f"{', '.join(self.operations)} in the forward of {self.type} at {self.path or 'the top'!r}"


def audit(network: nn.Module, images: Tensor) -> list[Finding]:
    """Operations of `network` that depend on the image non-linearly and that explanation mode does not hold; none is best.

    Args:
        network: of `convert` or `bcosify`, in training or evaluation mode; parameters, buffers and the random state are left as
            they were.
        images: (N, 6, H, W) in [0, 1]; two small ones will do.

    Returns:
        One finding per module, in the order of execution. Code that the network does not run for these images is not seen.
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
    """Raises ConversionError, in one line, where `audit` finds something; arguments as there."""
    findings = audit(network, images)
    if findings:
        types = ", ".join(dict.fromkeys(finding.type for finding in findings))
        raise ConversionError(
            f"explanation mode cannot hold {'; '.join(map(str, findings))}: write a rule with @register_conversion for {types} "
            "that passes each factor through Holdable.hold"
        )


def _is_linear(operation: str, depends: list[bool], outputs: set[int]) -> bool:
    """Whether the operation is linear in the image, given which of its tensors depend on that and which of its outputs count."""
    if operation in PRODUCTS:
        return sum(depends[place] for place in PRODUCTS[operation] if place < len(depends)) <= 1
    if operation in CONSTANT:
        return not any(depends[CONSTANT[operation] : CONSTANT[operation] + 1])
    if operation == "var_mean":
        return outputs == {1}  # the mean alone
    return operation in LINEAR


def _operation(node: str) -> str:
    """`NativeLayerNormBackward0` -> `native_layer_norm`, `MaxPool2DWithIndicesBackward0` -> `max_pool2d_with_indices`."""
    name = re.sub(r"Backwards?\d*$", "", node.rpartition("::")[2])
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"(?<=\d)D", "d", name)).lower()


def _parents(node: Any) -> list[tuple[Any, int]]:
    """Where each input of a node comes from, and as which output; None for what does not depend on the image."""
    return [
        (None, 0) if parent is None or _operation(parent.name()) in FLAT else (parent, number)
        for parent, number in node.next_functions
    ]


def _graph(last: Any) -> dict[Any, set[int]]:
    """All nodes of autograd's graph from `last` back to the image, and which outputs of each are used."""
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
    """The module whose call, of those that were running when this node was made, began last; nested ones end first."""
    return next((path for first, end, path in calls if first <= number < end), "")


class _Writes(TorchDispatchMode):
    """Notes operations in place: written to a view, they are hidden in the graph behind a node `CopySlices`, made right after."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.at[torch.autograd._get_sequence_nr()] = func._schema.name.removeprefix("aten::").rstrip("_")
        return func(*args, **(kwargs or {}))


@contextmanager
def _noting(network: nn.Module, calls: list[tuple[int, int, str]]) -> Iterator[None]:
    """In the block, appends to `calls` which of autograd's numbers each module's call spans, as it ends."""
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
    """In the block, no parameter requires gradients; after it, these, the buffers and the random state are as before."""
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
