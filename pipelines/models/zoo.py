"""`build(name, weights)` makes an ordinary network by name, with random, published or local weights.

Names are those of torchvision, timm and open_clip, and of this project's own networks (`OWN`): CIFAR ResNets,
X-DNN ResNets, SimpleViTs and ViT-Cs.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import timm
import torchvision
from torch import nn

from pipelines.models import clip
from pipelines.models.cifar import CifarResNet
from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.vit import SIMPLE_VITS, VITCS, simple_vit
from pipelines.models.weights import StateDict, fitted, load_strictly, names_a_file, read_state_dict
from pipelines.models.xdnn import XFIXUPS, XFixupResNet

log = logging.getLogger(__name__)


OWN: dict[str, Callable[..., nn.Module]] = {  # constructors of this project's own networks
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{name: partial(simple_vit, name) for name in SIMPLE_VITS + VITCS},
    **{name: partial(XFixupResNet, depth) for name, depth in XFIXUPS.items()},
}


def build(
    name: str,
    weights: str = "none",
    *,
    num_classes: int | None = None,
    sha256: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Builds a network: normalised images (N, 3, H, W) -> logits (N, K), or embeddings (N, D).

    Args:
        name: one of the following. If torchvision and timm both have a name, torchvision's network is built.

            - `resnet20` or `cifar_resnet20`: CIFAR ResNets of depth 8, 14, 20, 32, 44, 56, 110
            - `xfixup_resnet50`: X-DNN ResNets of depth 18, 34, 50, 101, 152
            - `simple_vit_s`, `vitc_s`: in sizes ti, s, b, l
            - a name of torchvision or timm; `torchvision:NAME` and `timm:NAME` say which
            - `open_clip:RN50`, `open_clip:FILE.json`: the image tower of a CLIP, see `clip.clip_config`
        weights: `none` (random), a tag of the library, or a local file or URL. Tags are torchvision's
            (`IMAGENET1K_V2`, `DEFAULT`), timm's (`pretrained`, or the tag after the dot) or open_clip's
            (`openai`). A local file takes precedence over a tag of the same name.
        num_classes: K. If the classifier of the weights has another number of classes, a new one with random
            weights replaces it, and the log says so. By default K is the weights' own or the library's
            default. An image tower takes no `num_classes`.
        sha256: digest that the weights file must have, checked before the file is read.
        options: further arguments of the network's constructor; for an image tower, see
            `clip.build_image_tower`.

    Raises:
        ModelError: the name is unknown (the message gives the nearest ones), or the network does not take the
            options.
        WeightsError: the weights file is missing, altered, unsafe, or of another network, or the tag is
            unknown.
    """
    library, plain = library_of(name)
    of_file = weights != "none" and names_a_file(weights)
    if sha256 is not None and not of_file:
        raise WeightsError(f"weights {weights!r}: a sha256 is that of a file or URL")
    if library == "open_clip":
        if num_classes is not None:
            raise ModelError(f"{name} is an image tower, which gives embeddings: it takes no num_classes")
        return clip.build_image_tower(plain, weights, sha256, options)
    construct, pretrained = _constructors(library, plain, options or {})
    try:
        if weights == "none":
            return construct(num_classes)
        if of_file:
            return _from_file(construct, weights, sha256, num_classes)
    except (ModelError, WeightsError):
        raise
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name} does not take the options {options}: {error}") from None
    try:
        model = pretrained(weights)
    except KeyError:
        raise WeightsError(
            f"weights {weights!r} of {name}: neither a tag that it has nor a file here"
        ) from None
    except (ValueError, RuntimeError, OSError) as error:
        raise WeightsError(f"weights {weights!r} of {name}: {error}") from None
    return _with_head(model, num_classes, weights)


Constructor = Callable[[int | None], nn.Module]


def _from_file(
    construct: Constructor, weights: str, sha256: str | None, num_classes: int | None
) -> nn.Module:
    like = construct(None)
    state = fitted(read_state_dict(weights, sha256), like, weights)
    model = construct(_classes_of(state, like))
    load_strictly(model, state, weights)
    return _with_head(model, num_classes, weights)


def _constructors(
    library: str, plain: str, options: dict[str, Any]
) -> tuple[Constructor, Callable[[str], nn.Module]]:
    """Functions that make the network with random weights for K classes, and with the weights of a tag."""

    def by_classes(make: Callable[..., nn.Module]) -> Constructor:
        return lambda classes: make(**({} if classes is None else {"num_classes": classes}), **options)

    if library == "own":
        return by_classes(OWN[plain]), _no_tags
    if library == "torchvision":
        get = torchvision.models.get_model
        return by_classes(lambda **more: get(plain, weights=None, **more)), lambda tag: get(
            plain, weights=tag, **options
        )
    create = timm.create_model
    return (
        by_classes(lambda **more: create(plain, **more)),
        lambda tag: create(plain if tag == "pretrained" else f"{plain}.{tag}", pretrained=True, **options),
    )


def library_of(name: str) -> tuple[Literal["own", "torchvision", "timm", "open_clip"], str]:
    """Returns the library that has the network `name`, and its name there.

    Raises:
        ModelError: no library has it; the message gives the nearest names.
    """
    if name.startswith(clip.PREFIX):
        plain = name.removeprefix(clip.PREFIX)
        if plain != clip.CUSTOM:
            clip.clip_config(plain)
        return "open_clip", plain
    library, _, plain = name.rpartition(":")
    own = plain.removeprefix("cifar_") if plain.startswith("cifar_resnet") else plain
    if library == "" and own in OWN:
        return "own", own
    if library in ("", "torchvision") and plain in torchvision.models.list_models(module=torchvision.models):
        return "torchvision", plain
    if library in ("", "timm") and timm.is_model(plain):
        return "timm", plain
    known = [*OWN, *torchvision.models.list_models(), *timm.list_models()]
    near = (
        ", ".join(difflib.get_close_matches(plain, known, 5))
        or "see torchvision.models and timm.list_models()"
    )
    raise ModelError(f"unknown model {name!r}; near it: {near}")


def _no_tags(tag: str) -> nn.Module:
    raise ValueError("this network has no tagged weights: give a file or URL")


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers; the last one is taken to be the classifier."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _classes_of(state: StateDict, like: nn.Module) -> int | None:
    """K, from the shape in `state` of the classifier of `like`; `None` if `like` or `state` lacks it."""
    heads = _linear_layers(like)
    weight = state.get(f"{heads[-1][0]}.weight") if heads else None
    return None if weight is None else len(weight)


def _with_head(model: nn.Module, num_classes: int | None, weights: str) -> nn.Module:
    """`model` with its own classifier if that has `num_classes` classes, otherwise with a new random one."""
    if num_classes is None:
        return model
    heads = _linear_layers(model)
    if not heads:
        raise ModelError(f"{type(model).__name__} has no linear classifier that could be replaced")
    name, old = heads[-1]
    if old.out_features == num_classes:
        log.info("%s: head %r kept, its %d classes taken to be those of the data", weights, name, num_classes)
        return model
    log.warning(
        "%s: head %r has %d classes, replaced by a new one with %d",
        weights,
        name,
        old.out_features,
        num_classes,
    )
    model.set_submodule(name, nn.Linear(old.in_features, num_classes, old.bias is not None))
    return model
