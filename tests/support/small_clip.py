"""A small CLIP with random weights: an image tower, its B-cosified twin, and their text tower."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.models import ModelSpec
from tests.support.clip import CONFIG

WIDTH, SIDE = CONFIG["embed_dim"], 32  # dimension of the embeddings; side of the images in pixels


def small_clip(folder: Path) -> dict[str, str]:
    """Folders of the image towers `original` and `bcos`, each with the same text tower."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "small.json"
    config.write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    network, text = models.build(f"open_clip:{config}"), models.build_text_tower(f"open_clip:{config}")
    for kind, name in (("conventional", "original"), ("bcos", "bcos")):
        spec = ModelSpec(f"open_clip:{config}", (), SIDE, kind, task="embedding")  # type: ignore[arg-type]
        tower = models.assemble(spec, network).train()
        with torch.no_grad():
            # Norms learn their statistics. Without them, embeddings of a random B-cos tower vanish.
            for _ in range(20):
                tower(add_inverse(torch.rand(16, 3, SIDE, SIDE)))
        models.save(folder / name, tower, spec)
        models.save_text_tower(folder / name, text)
    return {name: str(folder / name) for name in ("original", "bcos")}
