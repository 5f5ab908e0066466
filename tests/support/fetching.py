"""What the tests of sources share: fetching into temporary folders, and reading what has come."""

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
from pipelines.params import DataParams

SHARED = Path(os.environ.get("BCOS_SHARED", Path(__file__).parents[3] / "shared"))
SPLITS = ("train", "val", "test")


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
    """What the manifest of the last fetch says was left out."""
    return json.loads((tmp_path / "raw/manifest.json").read_text())["left_out"]


def sharded(some: Any, tmp_path: Path) -> str:
    """The root of the shards of params `some`."""
    source, raw = fetched(some, tmp_path)
    write_shards(source, raw, tmp_path / "shards", shard_size=50, progress=False)
    return str(tmp_path / "shards")


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
    return {key: batch["boxes"][batch["boxes"][:, 0] == row, 1:] for batch in batches for row, key in enumerate(batch["key"])}
