"""`build(name, weights)`: networks of torchvision and timm by name, and the CIFAR ResNets."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable
from typing import Any

import timm
import torchvision
from torch import nn

from pipelines.models.cifar import CifarResNet
from pipelines.models.weights import StateDict, WeightsError, load_strictly, read_state_dict

log = logging.getLogger(__name__)

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)


def build(
    name: str,
    weights: str = "none",
    *,
    num_classes: int | None = None,
    sha256: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """The network `name` with `weights`; it takes normalised images (N, 3, H, W) and gives logits (N, K).

    Args:
        name: `resnet20` (also `cifar_resnet20`; CIFAR: 8, 14, 20, 32, 44, 56, 110), a torchvision name, a timm name;
            `torchvision:name` and `timm:name` say which library, where both have it torchvision's is taken.
        weights: `none` for random ones, a tag of the library (torchvision: `IMAGENET1K_V2`, `DEFAULT`; timm: `pretrained` or the
            tag after the dot), or a local file or URL.
        num_classes: K; where the weights' head has another number, it is replaced by a new one, and the log says so. By
            default the weights' own, or the library's default.
        sha256: of the weights file, checked before it is read.
        options: further keyword arguments of the architecture's constructor.

    Raises:
        ValueError: an unknown name (the nearest ones are given).
        WeightsError: a weights file that is missing, altered, unsafe or of another network; an unknown tag.
    """
    construct, pretrained = _constructors(name, options or {})
    if weights == "none":
        return construct(num_classes)
    if not re.search(r"[/\\]|\.(th|pth|pt|safetensors|bin)$|^\w+://", weights):
        try:
            model = pretrained(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(f"weights {weights!r} of {name}: {error}") from None
        return _with_head(model, num_classes, weights)
    state = read_state_dict(weights, sha256)
    model = construct(_classes_of(state, construct(None)))
    load_strictly(model, state, weights)
    return _with_head(model, num_classes, weights)


def _constructors(name: str, options: dict[str, Any]) -> tuple[Callable[[int | None], nn.Module], Callable[[str], nn.Module]]:
    """How to make the network with a number of classes, and how to make it with a library's weights."""
    library, _, plain = name.rpartition(":")
    cifar = re.fullmatch(r"(?:cifar_)?resnet(\d+)", plain)
    if library == "" and cifar and int(cifar[1]) in CIFAR_DEPTHS:
        depth = int(cifar[1])
        return lambda classes: CifarResNet(depth, classes or 10, **options), _no_tags
    if library in ("", "torchvision") and plain in torchvision.models.list_models(module=torchvision.models):
        get = torchvision.models.get_model
        return (
            lambda classes: get(plain, weights=None, **({} if classes is None else {"num_classes": classes}), **options),
            lambda tag: get(plain, weights=tag, **options),
        )
    if library in ("", "timm") and timm.is_model(plain):
        return (
            lambda classes: timm.create_model(plain, **({} if classes is None else {"num_classes": classes}), **options),
            lambda tag: timm.create_model(plain if tag == "pretrained" else f"{plain}.{tag}", pretrained=True, **options),
        )
    known = [f"resnet{depth}" for depth in CIFAR_DEPTHS] + torchvision.models.list_models() + timm.list_models()
    near = ", ".join(difflib.get_close_matches(plain, known, 5)) or "see torchvision.models and timm.list_models()"
    raise ValueError(f"unknown model {name!r}; near it: {near}")


def _no_tags(tag: str) -> nn.Module:
    raise ValueError("CIFAR ResNets have no tagged weights: give a file or URL")


def _head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the classifier: the last linear layer."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear classifier")
    return layers[-1]


def _classes_of(state: StateDict, like: nn.Module) -> int | None:
    """The number of classes that `state` was trained for, from the shape of its head."""
    weight = state.get(f"{_head(like)[0]}.weight")
    return None if weight is None else len(weight)


def _with_head(model: nn.Module, num_classes: int | None, weights: str) -> nn.Module:
    name, old = _head(model)
    if num_classes is None or old.out_features == num_classes:
        return model
    log.warning("%s: head %r has %d classes, replaced by a new one with %d", weights, name, old.out_features, num_classes)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Linear(old.in_features, num_classes, old.bias is not None))
    return model
