"""Loads the published checkpoints of B-cos networks as models of this project.

Two repositories publish checkpoints. `load_published` names them as follows.

- `b-cos-v2:ARCHITECTURE` (B-cos/B-cos-v2; Böhle et al., TPAMI 2024): B-cos networks trained from scratch,
  with weight rows of norm 1, no activations, and an input that is not normalised. The repository's ordinary
  ViTs load by `build("simple_vit_s", weights=FILE)`.
- `b-cosification:ARCHITECTURE` (shrebox/B-cosification; Arya et al., NeurIPS 2024): B-cosified networks, with
  the default design of `bcosify`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any

import torchvision
from torch import nn

from pipelines.bcos import IMAGENET_MEAN, IMAGENET_STD
from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.store import ModelSpec, assemble
from pipelines.models.vit import SIMPLE_VITS, VITCS
from pipelines.models.weights import StateDict, load_strictly, read_state_dict

CLASSES, IMAGE_SIZE = 1000, 224
# published index of a layer in a block -> torchvision's, which counts the permutation and the activation too
CONVNEXT_PARTS = {"1": "2", "2": "3", "3": "5"}
DENSENET_PARTS = (  # children of `features`; published keys give their index
    *("conv0", "norm0", "relu0", "pool0"),
    *(
        "denseblock1",
        "transition1",
        "denseblock2",
        "transition2",
        "denseblock3",
        "transition3",
        "denseblock4",
        "norm5",
    ),
)


@dataclasses.dataclass(frozen=True)
class Publication:
    """Properties that the checkpoints of one repository share."""

    architectures: tuple[str, ...]  # names for `build`
    prefixes: tuple[str, ...]  # all keys of a file begin with the same one of these
    design: dict[str, Any]  # keyword arguments of `bcosify`
    mean: tuple[float, ...]
    std: tuple[float, ...]


_ALL = {
    "b": 2.0,
    "b_mode": "fixed",
    "bias": "remove",
    "norm": "uncentered",
    "stem_pool": "average",
    "max_out": 1,
    "position_embedding": "keep",
    "projection": "linear",
}
_LOGITS = {"logit_bias": -math.log(CLASSES - 1), "temperature": 1.0}
PUBLICATIONS = {
    "b-cos-v2": Publication(
        (
            *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
            "resnext50_32x4d",
            *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
            # the ConvNeXts published with position norms ("pn"), not those with batch norms ("bnu")
            "convnext_tiny",
            "convnext_base",
            *SIMPLE_VITS,
            *VITCS,
        ),
        ("0.", ""),  # a published ViT is the first of two modules; the second adds the logit bias
        {**_ALL, **_LOGITS, "activation": "remove", "normalize_weight": True},
        (0.0,) * 6,
        (1.0,) * 6,
    ),
    "b-cosification": Publication(
        ("resnet18", "resnet50", "densenet121", *SIMPLE_VITS, *VITCS),
        ("model.model.", "model."),  # keys in the trainer's checkpoint, and in its network alone
        {**_ALL, **_LOGITS, "activation": "keep", "normalize_weight": False, "gap_reorder": True},
        IMAGENET_MEAN,
        IMAGENET_STD,
    ),
}


def load_published(
    name: str, source: str, *, classes: tuple[str, ...] | None = None, sha256: str | None = None
) -> tuple[nn.Module, ModelSpec]:
    """Loads the published model `name`, in evaluation mode; returns it with its spec.

    Args:
        name: `b-cos-v2:resnet18`, `b-cosification:vitc_ti`, ...
        source: file or URL of the published checkpoint.
        classes: names of ImageNet's 1000 classes, in the order of their WordNet ids; by default
            torchvision's.
        sha256: digest that the file must have.

    Returns:
        The model, (N, 6, H, W) in [0, 1] -> logits (N, 1000), and the spec to `save` it with.

    Raises:
        ModelError: no such model was published, or `classes` are not 1000.
        WeightsError: the file is missing, altered, unsafe, or holds another network.
    """
    spec = published_spec(name, classes)
    model = assemble(spec, check=False)
    load_strictly(model, translated(name, read_state_dict(source, sha256), source), f"{source} of {name}")
    return model.eval(), spec


def published_spec(name: str, classes: tuple[str, ...] | None = None) -> ModelSpec:
    """Returns the spec of the published model `name`; arguments and errors as in `load_published`."""
    publication, architecture = _publication(name)
    if classes is None:
        classes = tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    if len(classes) != CLASSES:
        raise ModelError(f"{name} was trained for the {CLASSES} classes of ImageNet, not for {len(classes)}")
    # b-cos-v2: CNNs classify each place, then average; ViTs average first
    reorder = {"gap_reorder": architecture not in SIMPLE_VITS + VITCS}
    return ModelSpec(
        name=architecture,
        classes=classes,
        image_size=IMAGE_SIZE,
        kind="bcos",
        mean=publication.mean,
        std=publication.std,
        design={**reorder, **publication.design},
    )


def translated(name: str, state: StateDict, source: str) -> StateDict:
    """Returns `state` with the keys and shapes of the network that `published_spec(name)` describes.

    Keys without a counterpart stay, so that `load_strictly` names them in its error. Running means are
    dropped, because uncentred norms have none.

    Raises:
        WeightsError: the keys do not begin as those of the repository do.
    """
    publication, architecture = _publication(name)
    prefix = next(
        (prefix for prefix in publication.prefixes if all(key.startswith(prefix) for key in state)), None
    )
    if prefix is None:
        wanted = " or ".join(map(repr, publication.prefixes))
        found = next(key for key in state if not key.startswith(publication.prefixes))
        raise WeightsError(
            f"weights {source} of {name}: its keys start with {wanted}, not like {found!r}: "
            "is it from elsewhere?"
        )
    found_state = {}
    for key, value in state.items():
        if key.endswith(".running_mean"):
            continue
        # a published B-cos layer holds its weight in a child `linear`
        key = re.sub(r"\.linear\.weight$", ".weight", key.removeprefix(prefix))
        if architecture.startswith("convnext"):
            key = _convnext_key(key)
        if architecture.startswith("densenet") and name.startswith("b-cosification"):
            key = _densenet_key(key)
        if _is_pointwise(key) and value.shape[2:] == (1, 1):
            value = value.flatten(1)  # from a published 1×1 convolution to a linear layer
        found_state[f"body.{key}"] = value
    return found_state


def _publication(name: str) -> tuple[Publication, str]:
    where, _, architecture = name.partition(":")
    if where not in PUBLICATIONS or architecture not in PUBLICATIONS[where].architectures:
        known = [
            f"{where}:{architecture}"
            for where, publication in PUBLICATIONS.items()
            for architecture in publication.architectures
        ]
        near = ", ".join(difflib.get_close_matches(name, known, 5)) or ", ".join(known)
        raise ModelError(f"no published model {name!r}; near it: {near}")
    return PUBLICATIONS[where], architecture


def _is_pointwise(key: str) -> bool:
    """Returns True for the classifier of a CNN and for the two linear layers in a ConvNeXt block."""
    return re.search(r"^(fc|classifier|classifier\.2)\.weight$|\.block\.[35]\.weight$", key) is not None


def _convnext_key(key: str) -> str:
    """Translates a published ConvNeXt key to torchvision's.

    As published, the stem is two modules of `features` instead of one module with two children, and blocks
    have neither permutations nor activations.
    """
    key = re.sub(r"^features\.([2-9])\.", lambda found: f"features.{int(found[1]) - 1}.", key)
    key = re.sub(r"^features\.([01])\.weight$", r"features.0.\1.weight", key)
    key = re.sub(r"\.block\.([123])\.", lambda found: f".block.{CONVNEXT_PARTS[found[1]]}.", key)
    return re.sub(r"^classifier\.1\.", "classifier.2.", key)


def _densenet_key(key: str) -> str:
    """Translates a published DenseNet key to torchvision's.

    As published, the children of `features` and of its transitions have indices instead of names.
    """
    found = re.fullmatch(r"features\.(\d+)\.(.*)", key)
    if found is None or int(found[1]) >= len(DENSENET_PARTS):
        return key
    part, rest = DENSENET_PARTS[int(found[1])], found[2]
    if part.startswith("transition"):
        rest = re.sub(r"^([02])\.", lambda position: {"0": "norm.", "2": "conv."}[position[1]], rest)
    return f"features.{part}.{rest}"
