"""What the resolution and precision of stored explanations cost: in likeness to the live ones, and in bytes.

    dvc repro bcosify@pretrained && python -m tests.benchmarks.stored_maps [--images 512]

For images of the validation split: the mean cosine of the teacher's dynamic weights with what a student would be given, stored at
each resolution and precision and brought back to the image's size as the loader does. `ImageNet` is what 1,281,167 images of
224 px would take at the same number of pixels a cell. Prints a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pipelines  # noqa: F401  (first: it says how threads wait)

import torch  # isort: skip
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines import models
from pipelines.bcos import add_inverse, dynamic_weights
from pipelines.evaluation import split_batches
from pipelines.explanations import scaled
from pipelines.metrics.agreement import explanation_similarity
from pipelines.params import load
from stages.common import shards_of

IMAGENET, SIDE = 1_281_167, 224


def main() -> None:
    """Measures each resolution and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--teacher", type=Path, default=Path("models/bcosify/pretrained"))
    options = parser.parse_args()
    params = load()
    teacher, _ = models.load(options.teacher)
    maps: list[torch.Tensor] = []
    for batch in split_batches(shards_of(params.dataset), "val", params.data, 64):
        maps.append(dynamic_weights(teacher, add_inverse(batch["image"]))[1])
        if 64 * len(maps) >= options.images:
            break
    live = torch.cat(maps)
    side = live.shape[-1]
    print("| pixels a cell | precision | cosine with the live map | bytes an image | ImageNet |\n" + "| --- " * 5 + "|")
    for cell in (1, 2, 4, 8):
        for precision in (torch.float32, torch.float16):
            stored = scaled(live, side // cell).to(precision)
            given = F.resize(stored.float(), [side, side], interpolation=InterpolationMode.BILINEAR, antialias=False)
            cosine = float(explanation_similarity(given, live).mean())
            size = stored[0].nbytes
            whole = IMAGENET * size * (SIDE / side) ** 2
            name = str(precision).removeprefix("torch.")
            print(f"| {cell} × {cell} | {name} | {cosine:.4f} | {size:,} | {whole / 1e9:,.0f} GB |")


if __name__ == "__main__":
    main()
