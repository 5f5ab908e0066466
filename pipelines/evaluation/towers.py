"""Loads image and text towers, and embeds the images of a split. N images, D dimensions, K classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import models
from pipelines.bcos import BcosLinear, BcosNetwork, add_inverse
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import Manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.batches import labels_of
from pipelines.models import ModelError, ModelSpec
from pipelines.models.clip import TextTower, load_text_tower
from pipelines.models.zero_shot import ZeroShotNetwork, check_names, imagenet_names, zero_shot_weights
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.params.evaluation import Names
from pipelines.storage.model_folder import has_text_tower


@dataclass(frozen=True)
class Tower:
    """An image tower (N, 6, H, W) -> (N, D), its spec, and the text tower with the same embedding space."""

    model: nn.Module
    spec: ModelSpec
    text: TextTower


def load_image_tower(directory: str, device: torch.device) -> tuple[nn.Module, ModelSpec]:
    """Loads the frozen image tower in `directory`, or of the zero-shot classifier there, and its spec.

    Raises:
        ModelError: the model is a classifier with a head.
    """
    model, spec = models.load(directory)
    return image_tower(directory, model, spec).to(device).requires_grad_(False), spec


def image_tower(name: str, model: nn.Module, spec: ModelSpec) -> nn.Module:
    """Returns `model` if it is an image tower, or its tower if it is a zero-shot classifier.

    Raises:
        ModelError: the model, called `name`, is a classifier with a head.
    """
    if isinstance(model, ZeroShotNetwork):
        return model.tower
    if spec.task != "embedding":
        raise ModelError(
            f"{name}: a classifier of {len(spec.classes)} classes, not an image tower: "
            "its features match no text"
        )
    return model


def load_towers(
    directories: Mapping[str, str], texts: Mapping[str, str], device: torch.device
) -> dict[str, Tower]:
    """Loads image towers, each with its text tower; returns name -> tower.

    Args:
        directories: name -> folder of each image tower.
        texts: name of an image tower -> folder of its text tower; by default the image tower's own folder.
        device: device of all towers.

    Raises:
        ModelError: a classifier instead of an image tower, no text tower, or towers of different widths.
    """
    read: dict[str, TextTower] = {}
    towers: dict[str, Tower] = {}
    for name, directory in directories.items():
        model, spec = load_image_tower(directory, device)
        folder = texts.get(name, directory)
        if folder not in read:  # a B-cosified tower shares the text tower of its original
            read[folder] = read_text_tower(folder).to(device)
        towers[name] = Tower(model, spec, read[folder])
        check_width(name, model, spec, read[folder])
    return towers


def read_text_tower(folder: str) -> TextTower:
    """Loads the text tower in `folder`, frozen, in evaluation mode; raises `ModelError` if there is none."""
    if not has_text_tower(folder):
        raise ModelError(
            f"{folder}: no text tower (text.safetensors, text.json) there: name the folder that has it"
        )
    return load_text_tower(folder).eval().requires_grad_(False)


def check_width(name: str, model: nn.Module, spec: ModelSpec, text: TextTower) -> None:
    """Raises `ModelError` unless image and text embeddings have the same dimension."""
    width = output_width(model, spec)
    if width != text.width:
        raise ModelError(
            f"{name}: its embeddings have {width} values, those of the text tower {text.width}: "
            "they do not fit"
        )


@torch.no_grad()
def output_width(model: nn.Module, spec: ModelSpec) -> int:
    """D of a tower or backbone (N, 6, H, W) -> (N, D), measured by a forward pass of one grey image."""
    grey = torch.full((1, 6, spec.image_size, spec.image_size), 0.5, device=next(model.buffers()).device)
    return model(grey).shape[1]


def class_names(names: Names, manifest: Manifest) -> tuple[str, ...]:
    """Names of the classes for texts, in the order of the labels; `names` as in `ClipEvaluateParams`.

    Raises:
        ModelError: a name is empty or comes twice.
        DataError: there are more or fewer names than classes of the data.
    """
    if names == "data":
        return manifest.classes
    if names == "imagenet":
        names = imagenet_names()
    else:
        check_names(names)
    if len(names) != len(manifest.classes):
        raise DataError(f"names: {len(names)} names for the {len(manifest.classes)} classes of the data")
    return names


def zero_shot_networks(
    towers: Mapping[str, Tower],
    names: Sequence[str],
    templates: str | Sequence[str],
    params: ClipEvaluateParams,
    cache: str | None = None,
) -> dict[str, ZeroShotNetwork]:
    """Makes a zero-shot classifier of `names` per tower; `cache` is a folder for text embeddings."""
    embedded: dict[TextTower, Tensor] = {}  # towers may share a text tower
    networks: dict[str, ZeroShotNetwork] = {}
    for name, tower in towers.items():
        if tower.text not in embedded:
            # open_clip's names of ImageNet have `missile` and `sunglasses` twice.
            distinct = list(dict.fromkeys(names))
            rows = [distinct.index(each) for each in names]
            texts = zero_shot_weights(
                tower.text, distinct, templates, batch_size=params.text_batch, cache=cache
            )
            embedded[tower.text] = texts[rows]
        network = ZeroShotNetwork(tower.model, embedded[tower.text], params.scale, params.hold_norm)
        networks[name] = network.to(next(tower.model.buffers()).device).eval()
    return networks


def load_features(directory: str, device: torch.device) -> tuple[nn.Module, ModelSpec]:
    """Loads the frozen backbone in `directory`, a tower or a classifier without its head, and its spec.

    The backbone maps (N, 6, H, W) to (N, D): a tower's embeddings or the inputs of a classifier's head,
    averaged over the locations if the head is applied at each location.
    """
    model, spec = models.load(directory)
    if isinstance(model, ZeroShotNetwork):
        model = model.tower
    elif spec.task != "embedding":
        replace_head(model, nn.Identity())
    return model.to(device).requires_grad_(False).eval(), spec


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of a classifier's head, its last linear layer; raises `ModelError` if there is none."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | BcosLinear)
    ]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layer as its head: its features are not known"
        )
    return layers[-1]


def replace_head(model: nn.Module, head: nn.Module) -> None:
    """Replaces the classifier's head; sets a B-cos network's temperature to 1 and its logit bias to 0."""
    model.set_submodule(head_of(model)[0], head)
    if isinstance(model, BcosNetwork):
        model.temperature, model.logit_bias = 1.0, 0.0


@torch.no_grad()
def unit_embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Normalised embeddings of images (N, 3, H, W) in [0, 1]: float32 (N, D), rows of norm 1."""
    return F.normalize(model(add_inverse(images)).float(), dim=1)


@dataclass(frozen=True)
class Embedded:
    """Embeddings and labels of a split's images, from all workers, sorted by key."""

    embeddings: dict[str, Tensor]  # model -> (N, D) on the CPU, rows of norm 1
    labels: Tensor  # (N,), or multi-hot (N, K)
    skipped: int


def embed_split(
    context: Context,
    backbones: Mapping[str, nn.Module],
    shards: str,
    data: DataParams,
    batch_size: int,
    split: str,
) -> Embedded:
    """Embeds a labelled split by each of `backbones`, in one pass over the images.

    Raises:
        DataError: there is no image.
    """
    keys: list[str] = []
    labels: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in backbones}
    mine = loader(shards, split, data, batch_size, context=context, fields=())
    for batch in mine:
        batch = to_device(batch, context.device)
        keys += batch["key"]
        labels.append(labels_of(batch).cpu())
        for name, model in backbones.items():
            rows[name].append(unit_embeddings(model, batch["image"]).cpu())
    parts = gather((keys, labels, rows, mine.skipped), context)
    all_keys = [key for part in parts for key in part[0]]
    if not all_keys:
        raise DataError(
            f"{shards}: no image in {split} to evaluate: the split is empty, or none of its images decodes"
        )
    order = sorted(range(len(all_keys)), key=all_keys.__getitem__)
    return Embedded(
        {name: torch.cat([each for part in parts for each in part[2][name]])[order] for name in backbones},
        torch.cat([each for part in parts for each in part[1]])[order],
        sum(part[3] for part in parts),
    )


def as_classifier(spec: ModelSpec, names: Sequence[str]) -> ModelSpec:
    """Turns the spec of a tower into that of a classifier of the classes `names`."""
    return replace(spec, classes=tuple(names), task="multiclass")
