"""Zero-shot classifiers: an image tower, and one text embedding per class.

    logit_k = scale · cos(e, t_k),   e the image's embedding, t_k that of class k's prompts

N images, H × W pixels, K classes (texts), D features of an embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.cosine import CosineHead
from pipelines.models.clip import TextTower, embedding_width, open_clip
from pipelines.models.errors import ModelError
from pipelines.storage.files import staged

if TYPE_CHECKING:
    from pipelines.models.store import ModelSpec

PLACE = "{}"  # placeholder of the class name in a template
PLAIN = ("a photo of a {}.",)


class ZeroShotNetwork(nn.Module):
    """Images (N, 6, H, W) in [0, 1] -> logits (N, K), the scaled cosines of their embeddings with K texts.

    `dynamic_weights` explains several texts per image from one forward pass.

    With `hold_norm`, explanation mode holds the norm of the image's embedding, so that a cosine's
    contributions sum to the cosine. Otherwise the norm is differentiated, as in the published code, and they
    sum to 0.
    """

    logit_bias = 0.0

    def __init__(self, tower: nn.Module, texts: Tensor, scale: float = 1.0, hold_norm: bool = True) -> None:
        super().__init__()
        self.tower = tower  # (N, 6, H, W) -> embeddings (N, D)
        self.head = CosineHead(texts, scale, hold_norm)

    @property
    def mean(self) -> Tensor:
        """(6,), subtracted from the channels: the image whose contributions are 0."""
        return self.tower.mean  # type: ignore[return-value]

    @property
    def std(self) -> Tensor:
        """(6,), by which the channels are divided."""
        return self.tower.std  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tower(images))


def zero_shot_classifier(
    tower: nn.Module | str | Path,
    spec: ModelSpec,
    text_tower: TextTower,
    names: Sequence[str],
    templates: str | Sequence[str] = "imagenet",
    scale: float = 100.0,
    *,
    batch_size: int = 256,
    cache: str | None = None,
) -> tuple[ZeroShotNetwork, ModelSpec]:
    """Returns the zero-shot classifier of the classes `names`, in evaluation mode, and its spec.

    Args:
        tower: the image tower, or its folder or URL.
        spec: the image tower's; for a folder or URL, the spec there is used instead.
        text_tower: the text tower of the same CLIP.
        names: of the classes, in order.
        templates: see `templates_of`.
        scale: factor of the cosines.
        batch_size, cache: see `zero_shot_weights`.

    Raises:
        ModelError: the towers have different widths, or the scale is not finite and above 0; see
            `zero_shot_weights`.
    """
    if not isinstance(tower, nn.Module):
        from pipelines.models.store import load

        tower, spec = load(tower)
    if not 0 < scale < math.inf:
        raise ModelError(f"the scale of cosines is a finite number above 0, not {scale}")
    width = embedding_width(spec.name, spec.options)
    if width != text_tower.width:
        raise ModelError(
            f"the towers give embeddings of {width} numbers for images and {text_tower.width} for texts"
        )
    texts = zero_shot_weights(text_tower, names, templates, batch_size=batch_size, cache=cache)
    model = ZeroShotNetwork(tower, texts, scale).eval()
    of_classes = {"scale": scale, "width": width}
    return model, dataclasses.replace(spec, task="multiclass", classes=tuple(names), zero_shot=of_classes)


def zero_shot_weights(
    tower: TextTower,
    names: Sequence[str],
    templates: str | Sequence[str] = "imagenet",
    *,
    batch_size: int = 256,
    cache: str | None = None,
) -> Tensor:
    """Returns text embeddings (K, D) of K classes, float32, on the CPU, with rows of norm 1.

    A class's embedding is the normalised mean of the normalised embeddings of its prompts, one prompt per
    template.

    Args:
        tower: the text tower.
        names: of the classes, all different.
        templates: see `templates_of`.
        batch_size: prompts per forward pass, which bounds the memory.
        cache: folder in which results are kept, by text tower, names and templates; `None` keeps none.

    Raises:
        ModelError: there is no name, an empty one, or the same one twice; see `templates_of`.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021,
        section 3.1.4.
    """
    patterns = templates_of(templates)
    check_names(names)
    path = None if cache is None else Path(cache, f"{_key(tower, names, patterns)}.safetensors")
    if path is not None and path.is_file():
        return safetensors.torch.load_file(path)["texts"]
    device = next(tower.parameters()).device
    sums = torch.zeros(len(names), tower.width, device=device)
    count = len(names) * len(patterns)
    for start in range(0, count, batch_size):
        batch = range(start, min(start + batch_size, count))
        prompts = [
            patterns[index % len(patterns)].replace(PLACE, names[index // len(patterns)]) for index in batch
        ]
        classes = torch.tensor([index // len(patterns) for index in batch], device=device)
        sums.index_add_(0, classes, tower.encode(prompts, batch_size))
    texts = F.normalize(sums, dim=-1).cpu()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as new:
            safetensors.torch.save_file({"texts": texts}, new)
    return texts


def check_names(names: Sequence[str]) -> None:
    """Raises ModelError if there are no class names, or one is empty or occurs twice.

    open_clip's names of ImageNet are accepted, although two pairs of classes share a name (missile,
    sunglasses).
    """
    if not names:
        raise ModelError("no names of classes")
    if tuple(names) == imagenet_names():
        return
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name.strip():
            raise ModelError(f"the name of class {index} is empty")
        if name in seen:
            raise ModelError(f"classes {seen[name]} and {index} have the same name {name!r}")
        seen[name] = index


def templates_of(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Returns prompt templates, each with the placeholder `{}` for the name of a class.

    Args:
        templates: `imagenet` (open_clip's 80), `simple` (open_clip's 7), `plain` (`a photo of a {}.`), or a
            list of templates.

    Raises:
        ModelError: the name is unknown, the list is empty, or a template has no placeholder.
    """
    if isinstance(templates, str):
        known = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
        if templates == "plain":
            return PLAIN
        if templates not in known:
            raise ModelError(
                f"unknown templates {templates!r}: imagenet, simple, plain, or a list of one's own"
            )
        return tuple(template(PLACE) for template in getattr(open_clip(), known[templates]))
    if not templates:
        raise ModelError("no templates")
    for template in templates:
        if PLACE not in template:
            raise ModelError(f"template {template!r} has no place for the name: write {{}} there")
    return tuple(templates)


def imagenet_names() -> tuple[str, ...]:
    """Returns open_clip's names of ImageNet's 1000 classes, in the order of their WordNet ids."""
    return tuple(open_clip().IMAGENET_CLASSNAMES)


def _key(tower: TextTower, names: Sequence[str], templates: Sequence[str]) -> str:
    """A digest of the text tower's config and weights, the names and the templates."""
    digest = hashlib.sha256(json.dumps([tower.config, list(names), list(templates)], sort_keys=True).encode())
    for name, value in tower.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
