"""A plain copy of an ordinary network, whose types and parameters alone determine what it computes.

A conversion rule reads a module's type and parameters, and nothing else. PyTorch can change what a module
computes in other ways: forward hooks, weights that a hook or a parametrization computes from other tensors, a
`forward` that is set on one instance. A rule would drop these without an error. `plain_copy` turns them into
parameters if it can, and otherwise refuses the network.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pipelines.bcos.errors import ConversionError

log = logging.getLogger(__name__)

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that computes the same in evaluation mode and whose weights are plain parameters.

    Weight norm, spectral norm, other parametrizations and pruning become permanent: the copy has the weights
    that they compute. Compiled modules are replaced by their originals. `model` is left untouched.

    Raises:
        ConversionError: `model` has a hook, a `forward` set on an instance, a lazy, complex or quantised
            parameter, is a TorchScript program, or cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            "a TorchScript program cannot be converted: give the network that it was made of"
        )
    _check_tensors(model)
    # `copy.deepcopy` refuses tensors with a graph, so its memo gets detached copies of them
    computed = {id(value): value.detach().clone() for value in _computed(model)}
    try:
        copied = _compiled_from(copy.deepcopy(model, computed))
    except (RuntimeError, TypeError) as error:
        told = " ".join(str(error).split())
        raise ConversionError(
            f"a {type(model).__name__} that cannot be copied cannot be converted ({told})"
        ) from None
    for path, module in list(copied.named_modules()):
        for name, child in list(module.named_children()):
            if child is not (original := _compiled_from(child)):
                setattr(module, name, original)
        for kind in _made_permanent(module):
            log.info("%s at %r becomes permanent: it does not go on during training", kind, path)
    for path, module in copied.named_modules():
        _check_module(module, path)
    return copied


def _check_tensors(model: nn.Module) -> None:
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConversionError(
                f"{path!r} has no values yet: send one batch through the lazy modules before the conversion"
            )
        if tensor.is_complex() or tensor.is_quantized:
            kind = "complex" if tensor.is_complex() else "quantised"
            raise ConversionError(
                f"{path!r} is {kind} ({tensor.dtype}): B-cos layers are real; convert the network in float32"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise ConversionError(
                f"{path!r} has a gradient hook, which a conversion would lose: "
                "remove it, and add it afterwards"
            )


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Non-leaf tensors that are attributes of modules, such as weights that a pre-hook has computed."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _compiled_from(module: nn.Module) -> nn.Module:
    """The original of a module that `torch.compile` has wrapped; any other module is returned as it is."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def _made_permanent(module: nn.Module) -> list[str]:
    """Replaces weights that hooks and parametrizations compute by parameters; returns their kinds."""
    kinds = []
    for hook in reversed(list(module._forward_pre_hooks.values())):
        if isinstance(hook, WeightNorm):
            trained = getattr(module, f"{hook.name}_v").requires_grad
            remove_weight_norm(module, hook.name)
            getattr(module, hook.name).requires_grad_(trained)
            kinds.append("weight norm")
        elif isinstance(hook, SpectralNorm):
            trained = getattr(module, f"{hook.name}_orig").requires_grad
            remove_spectral_norm(module, hook.name)
            getattr(module, hook.name).requires_grad_(trained)
            kinds.append("spectral norm")
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
            kinds.append("pruning")
    if parametrize.is_parametrized(module):
        # copy and original share a type, which `remove_parametrizations` changes: give the copy its own type
        kind: Any = type(module)
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrizations: Any = module.parametrizations
        parametrizations.eval()  # in training mode, each access of the weight updates spectral norm
        for name in list(parametrizations):
            kinds += [type(step).__name__ for step in parametrizations[name]]
            parametrize.remove_parametrizations(module, name)
    return kinds


def _check_module(module: nn.Module, path: str) -> None:
    for attribute, kind in HOOKS.items():
        for hook in getattr(module, attribute).values():
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise ConversionError(
                f"a {kind} ({name}) at {path or 'the top'!r} would be lost: "
                "remove it by its handle, or make it a module"
            )
    forward = vars(module).get("forward")
    if forward is not None:
        name = getattr(forward, "__qualname__", type(forward).__name__)
        place = f"{type(module).__name__} at {path or 'the top'!r}"
        raise ConversionError(
            f"the {place} has a forward of its own ({name}), which a conversion would lose: "
            "make it a method of a class"
        )
