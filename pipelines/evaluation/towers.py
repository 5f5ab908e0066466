"""Image towers under evaluation, the text towers that go with them, and embeddings of the images of a split."""

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
from pipelines.models.folder import has_text_tower
from pipelines.models.zero_shot import ZeroShotNetwork, check_names, imagenet_names, zero_shot_weights
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.params.evaluation import Names


@dataclass(frozen=True)
class Tower:
    """An image tower (N, 6, H, W) -> (N, D), its spec, and the text tower whose embeddings lie in the same space."""

    model: nn.Module
    spec: ModelSpec
    text: TextTower


def load_image_tower(directory: str, device: torch.device) -> tuple[nn.Module, ModelSpec]:
    """The image tower in `directory`, that of a zero-shot classifier too, frozen and in evaluation mode, and its spec.

    Raises:
        ModelError: the model is another classifier.
    """
    model, spec = models.load(directory)
    return image_tower(directory, model, spec).to(device).requires_grad_(False), spec


def image_tower(name: str, model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The image tower that `model` is, or that is in it if it is a zero-shot classifier; `name` is for the error.

    Raises:
        ModelError: the model is another classifier.
    """
    if isinstance(model, ZeroShotNetwork):
        return model.tower
    if spec.task != "embedding":
        raise ModelError(
            f"{name}: a classifier of {len(spec.classes)} classes, not an image tower: its features match no text"
        )
    return model


def load_towers(
    directories: Mapping[str, str], texts: Mapping[str, str], device: torch.device
) -> dict[str, Tower]:
    """The image towers in `directories` (name -> folder), each with its text tower.

    Args:
        directories: of the image towers.
        texts: name of an image tower -> folder of its text tower; by default the image tower's own folder.
        device: of all towers.

    Raises:
        ModelError: a classifier instead of an image tower, no text tower, or towers of two widths.
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
    """The text tower in `folder`, frozen and in evaluation mode; raises ModelError if there is none."""
    if not has_text_tower(folder):
        raise ModelError(
            f"{folder}: no text tower (text.safetensors, text.json) there: name the folder that has it"
        )
    return load_text_tower(folder).eval().requires_grad_(False)


def check_width(name: str, model: nn.Module, spec: ModelSpec, text: TextTower) -> None:
    """Raises ModelError unless image and text embeddings have the same width."""
    width = output_width(model, spec)
    if width != text.width:
        raise ModelError(
            f"{name}: its embeddings have {width} values, those of the text tower {text.width}: they do not fit"
        )


@torch.no_grad()
def output_width(model: nn.Module, spec: ModelSpec) -> int:
    """D of a tower or backbone (N, 6, H, W) -> (N, D), through which one grey image is sent."""
    grey = torch.full((1, 6, spec.image_size, spec.image_size), 0.5, device=next(model.buffers()).device)
    return model(grey).shape[1]


def class_names(names: Names, manifest: Manifest) -> tuple[str, ...]:
    """The names that texts call the classes of the data, in the order of their labels: `names`, see `ClipEvaluateParams`.

    Raises:
        ModelError: an empty name, or one that is there twice.
        DataError: another number of names than the data has classes.
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
    """Zero-shot classifiers of the classes `names`, one for each tower; `cache` is a folder of text embeddings."""
    embedded: dict[TextTower, Tensor] = {}  # towers may share a text tower
    networks: dict[str, ZeroShotNetwork] = {}
    for name, tower in towers.items():
        if tower.text not in embedded:
            distinct = list(
                dict.fromkeys(names)
            )  # open_clip's names of ImageNet have `missile` and `sunglasses` twice
            rows = [distinct.index(each) for each in names]
            texts = zero_shot_weights(
                tower.text, distinct, templates, batch_size=params.text_batch, cache=cache
            )
            embedded[tower.text] = texts[rows]
        network = ZeroShotNetwork(tower.model, embedded[tower.text], params.scale, params.hold_norm)
        networks[name] = network.to(next(tower.model.buffers()).device).eval()
    return networks


def load_features(directory: str, device: torch.device) -> tuple[nn.Module, ModelSpec]:
    """The backbone in `directory`, frozen: an image tower as it is, a classifier without its head; and its spec.

    It gives (N, C): embeddings, or what the head sees, averaged over the places if it sees every place.
    """
    model, spec = models.load(directory)
    if isinstance(model, ZeroShotNetwork):
        model = model.tower
    elif spec.task != "embedding":
        replace_head(model, nn.Identity())
    return model.to(device).requires_grad_(False).eval(), spec


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The head of a classifier, its last linear layer, and its name; raises ModelError if there is none."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | BcosLinear)
    ]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layer as its head: its features are not known"
        )
    return layers[-1]


def replace_head(model: nn.Module, head: nn.Module) -> None:
    """Puts `head` in the place of the classifier's head, and takes away what comes after it: temperature and logit bias."""
    model.set_submodule(head_of(model)[0], head)
    if isinstance(model, BcosNetwork):
        model.temperature, model.logit_bias = 1.0, 0.0


@torch.no_grad()
def unit_embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings of images (N, 3, H, W) in [0, 1], each divided by its norm: (N, D) of float32."""
    return F.normalize(model(add_inverse(images)).float(), dim=1)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the images of a split by all workers, and their labels, in the order of the keys."""

    embeddings: dict[str, Tensor]  # (N, D) on the CPU, rows of norm 1, of each model
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
    """Embeddings of a labelled split by each of the `backbones`, from one pass over the images.

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
    """The spec of a tower as that of a classifier of the classes `names`."""
    return replace(spec, classes=tuple(names), task="multiclass")
