"""Image-text retrieval: recall@k of captions by images and of images by captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.towers import load_towers, unit_embeddings
from pipelines.metrics import Recall, measured
from pipelines.params import ClipEvaluateParams, DataParams


@exact_float32()
def evaluate_retrieval(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: ClipEvaluateParams,
    split: str = "test",
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Recall@1, @5 and @10 of image towers in both directions, see `Recall`; the same on every worker.

    Every caption of an image is a correct answer for it. Image towers that share a text tower share the
    embeddings of the captions, too.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of each image tower.
        shards: root of the data.
        data: how shards are read.
        params: batch sizes.
        split: the split whose images and captions are queries and candidates.
        texts: name of a tower -> folder of its text tower; by default the tower's own folder.

    Returns:
        `{"models": {name: {"image_to_text_recall_at_1", ..., "text_to_image_recall_at_10"}}, "images": N,
        "captions": T, "without_caption": n, "skipped": n}`, fractions in [0, 1]. An image without a caption
        is no query, but it is a candidate for captions.

    Raises:
        DataError: no image of the split has a caption.
        ModelError: a folder without image tower or text tower, or towers of different widths.
    """
    if "caption" not in read_manifest(shards).fields.get(split, ()):
        raise DataError(f"{shards}: no image of {split} has a caption: retrieval needs some")
    towers = load_towers(directories, texts or {}, context.device)
    recall = {name: Recall(tower.text.width).to(context.device) for name, tower in towers.items()}
    counts = dict.fromkeys(("images", "captions", "without_caption"), 0)
    mine = loader(shards, split, data, params.batch_size, context=context, fields=("captions",))
    for batch in mine:
        batch = to_device(batch, context.device)
        of_images = [[text for text in some if text.strip()] for some in batch["captions"]]
        captions = [text for some in of_images for text in some]
        owners = torch.tensor(
            [row for row, some in enumerate(of_images) for _ in some],
            dtype=torch.int64,
            device=context.device,
        )
        encoded = {tower.text: tower.text.encode(captions, params.text_batch) for tower in towers.values()}
        for name, tower in towers.items():
            recall[name].update(unit_embeddings(tower.model, batch["image"]), encoded[tower.text], owners)
        found = {
            "images": len(of_images),
            "captions": len(captions),
            "without_caption": sum(not some for some in of_images),
        }
        counts = {key: counts[key] + found[key] for key in counts}
    figures = {name: measured(metric.compute()) for name, metric in recall.items()}
    everywhere = {
        key: sum(gather(count, context)) for key, count in {**counts, "skipped": mine.skipped}.items()
    }
    return {"models": figures, **everywhere}
