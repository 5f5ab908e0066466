"""Size of stored explanations and their similarity to live ones, by resolution and precision.

    dvc repro bcosify@pretrained && python -m benchmarks.stored_maps

Prints two tables for images of the validation split. The first has, per resolution and precision of the
stored maps, the mean cosine of the teacher's dynamic weights with the stored maps (resized to the image's
size, as the loader does), and bytes per image. Its column `ImageNet` is the size for 1,281,167 images of 224
px with the same number of pixels per cell.

The second is about augmentation: a stored map takes the same crop and flip as its image, and the stored
logits stay as they are. It compares them with the teacher's live logits and maps of the augmented view: share
of equal top-1, KL divergence, and cosine of maps.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from benchmarks.markdown import table
from pipelines import models
from pipelines.bcos import add_inverse, dynamic_weights
from pipelines.data.loading.loader import loader
from pipelines.data.loading.transforms import STORED_MAP, train_transform
from pipelines.losses import distillation_loss
from pipelines.methods.stored_explanations import scaled
from pipelines.metrics.agreement import agreement, explanation_similarity
from pipelines.params import load
from pipelines.workflow.places import model_folder, shards_of

IMAGES, IMAGENET, SIDE = 512, 1_281_167, 224


def main() -> None:
    """Prints both tables."""
    params = load()
    teacher, _ = models.load(model_folder("bcosify/pretrained"))
    images = torch.cat(
        [batch["image"] for batch in loader(shards_of(params.dataset), "val", params.data, 64)]
    )
    images = images[:IMAGES]
    logits, live = explained(teacher, images)
    side = live.shape[-1]
    rows = []
    for cell in (1, 2, 4, 8):
        for precision in (torch.float32, torch.float16):
            stored = scaled(live, side // cell).to(precision)
            given = F.resize(
                stored.float(), [side, side], interpolation=InterpolationMode.BILINEAR, antialias=False
            )
            cosine = float(explanation_similarity(given, live).mean())
            size = stored[0].nbytes
            whole = IMAGENET * size * (SIDE / side) ** 2
            name = str(precision).removeprefix("torch.")
            rows.append([f"{cell} × {cell}", name, f"{cosine:.4f}", f"{size:,}", f"{whole / 1e9:,.0f} GB"])
    print(
        table(["pixels a cell", "precision", "cosine with the live map", "bytes an image", "ImageNet"], rows)
    )
    followed = train_transform(params.data, stored_map=True)
    views = [
        followed({"image": (image * 255).round().byte(), STORED_MAP: stored}, random.Random(number))
        for number, (image, stored) in enumerate(zip(images, live, strict=True))
    ]
    of_view, maps = explained(teacher, torch.stack([view["image"] for view in views]) / 255, logits.argmax(1))
    stored = torch.stack([view[STORED_MAP] for view in views])
    same, divergence = float(agreement(of_view, logits)), float(distillation_loss(of_view, logits))
    cosine = float(explanation_similarity(maps, stored).mean())
    row = [f"{figure:.3f}" for figure in (same, divergence, cosine)]
    print("\n" + table(["equal top-1", "KL divergence", "cosine of the maps"], [row]))


def explained(teacher: nn.Module, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and dynamic weights (N, 6, H, W) of images (N, 3, H, W); `None`: predicted classes."""
    parts = images.split(64)
    of_parts = [None] * len(parts) if targets is None else targets.split(64)
    found = [
        dynamic_weights(teacher, add_inverse(some), wanted)
        for some, wanted in zip(parts, of_parts, strict=True)
    ]
    logits, weights = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(weights)


if __name__ == "__main__":
    main()
