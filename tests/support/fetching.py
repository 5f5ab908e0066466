"""Helpers for tests of sources: fetch into temporary folders, and read the samples."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import Sample
from pipelines.data.shards.writer import write_shards
from pipelines.data.sources import get
from pipelines.params import DataParams, ImageFolderParams

SHARED = Path(os.environ.get("BCOS_SHARED", Path(__file__).parents[3] / "shared"))
SPLITS = ("train", "val", "test")
CLASSES = ("ant", "bee", "cat")  # of `photo_folder`


def fetched(some: Any, tmp_path: Path):
    """The source of params `some`, and the folder it has fetched into."""
    raw = tmp_path / "raw"
    shutil.rmtree(raw, ignore_errors=True)  # as DVC does
    source = get(some)
    source.fetch(raw, tmp_path / "cache", progress=False)
    return source, raw


def samples(some: Any, tmp_path: Path) -> dict[str, list[Sample]]:
    """The samples of params `some`, by split."""
    source, raw = fetched(some, tmp_path)
    return {split: [source.load(raw, ref) for ref in source.index(raw, split)] for split in SPLITS}


def by_key(some: Any, tmp_path: Path) -> dict[str, Sample]:
    """The samples of params `some`, of all splits."""
    return {sample.key: sample for listed in samples(some, tmp_path).values() for sample in listed}


def left_out(tmp_path: Path) -> dict[str, int]:
    """The samples that were left out, by the manifest of the last fetch."""
    return json.loads((tmp_path / "raw/manifest.json").read_text())["left_out"]


def sharded(some: Any, tmp_path: Path) -> str:
    """The root of the shards of params `some`."""
    source, raw = fetched(some, tmp_path)
    write_shards(source, raw, tmp_path / "shards", shard_size=50, progress=False)
    return str(tmp_path / "shards")


def photo_folder(root: Path) -> Path:
    """A folder of noise images, each another one, in three classes: 8 a class in `train`, 2 in `test`."""
    seed = 0
    for split, count in (("train", 8), ("test", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed += 1
                (root / split / name / f"{number:02d}.png").write_bytes(encoded(seed))
    return root


def image_folder(root: Any, **changes: Any) -> ImageFolderParams:
    """Params of the images at `root`, six of which are held out."""
    return ImageFolderParams(**{"source": "imagefolder", "root": str(root), "val_count": 6, **changes})


def encoded(seed: int, kind: str = "png", mode: str = "RGB") -> bytes:
    """A noise image of 5 x 6 pixels."""
    array = np.random.default_rng(seed).integers(0, 256, (6, 5, len(mode)), np.uint8)
    output = io.BytesIO()
    Image.fromarray(array[..., 0] if mode == "L" else array, mode).save(output, kind)
    return output.getvalue()


def write_files(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """`root`, with these files in it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """A photo of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, "jpeg")
    return output.getvalue()


def ids_of(sample: Sample) -> np.ndarray:
    """The instance ids of a sample's mask, (H, W)."""
    assert sample.mask is not None
    return np.asarray(Image.open(io.BytesIO(sample.mask))).astype(int)


def boxes_at(root: str, split: str, size: int) -> dict[str, torch.Tensor]:
    """(n, 5) boxes by key, as the loader gives them with images of size x size."""
    batches = loader(root, split, DataParams(image_size=size), 16)
    return {
        key: batch["boxes"][batch["boxes"][:, 0] == row, 1:]
        for batch in batches
        for row, key in enumerate(batch["key"])
    }
