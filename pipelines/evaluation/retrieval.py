"""Retrieval: recall@k of captions by images and of images by captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context, gather, to_device
from pipelines.evaluation.towers import load_towers, unit_embeddings
from pipelines.params import ClipEvaluateParams, DataParams

KS = (1, 5, 10)
BLOCK = 1024  # rows of the similarity matrix at once


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
    """Recall@1, @5 and @10 both ways of image towers on a split with captions; the same on every worker.

    All captions of an image are its own. An image counts as found if any of its captions is among the first k.

    Args:
        context: of this worker.
        directories: of the image towers, by name.
        shards: root of the data.
        data: how shards are read.
        params: batch sizes.
        split: of whose images and captions each is searched for among all.
        texts: name of a tower -> folder of its text tower; by default the tower's own folder.

    Returns:
        `{"models": {name: {"image_to_text_recall@1", ..., "text_to_image_recall@10"}}, "images": N, "captions": T,
        "without_caption": n, "skipped": n}`, fractions in [0, 1].

    Raises:
        DataError: no image of the split has a caption.
        ModelError: no image tower or text tower in a folder; towers of two widths.
    """
    if "caption" not in read_manifest(shards).fields.get(split, ()):
        raise DataError(f"{shards}: no image of {split} has a caption: retrieval needs some")
    towers = load_towers(directories, texts or {}, context.device)
    captions: list[list[str]] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in towers}
    without = 0
    mine = loader(shards, split, data, params.batch_size, context=context, fields=("captions",))
    for batch in mine:
        batch = to_device(batch, context.device)
        of_images = [[text for text in some if text.strip()] for some in batch["captions"]]
        kept = [place for place, some in enumerate(of_images) if some]
        without += len(of_images) - len(kept)
        captions += [of_images[place] for place in kept]
        for name, tower in towers.items():
            rows[name].append(unit_embeddings(tower.model, batch["image"][kept]) if kept else torch.empty(0))
    flat = [text for some in captions for text in some]
    own = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(some) for some in captions], dtype=torch.int64))
    encoded = {id(tower.text): tower.text for tower in towers.values()}
    by_tower = {key: text.encode(flat, params.text_batch) if flat else torch.empty(0) for key, text in encoded.items()}
    counts = {
        "images": sum(gather(len(captions), context)),
        "captions": sum(gather(len(flat), context)),
        "without_caption": sum(gather(without, context)),
        "skipped": sum(gather(mine.skipped, context)),
    }
    if counts["images"] == 0:
        raise DataError(f"{shards}: no image of {split} that decodes has a caption")
    found = {}
    for name, tower in towers.items():
        images_ND = torch.cat([each for each in rows[name] if len(each)] or [torch.empty(0)])
        found[name] = recalls(context, images_ND, by_tower[id(tower.text)], own)
    return {"models": found, **counts}


def recalls(context: Context, images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall@k both ways, of the images and texts of all workers.

    Args:
        context: of this worker.
        images: this worker's embeddings (N, D), rows of norm 1.
        texts: this worker's embeddings (T, D), rows of norm 1.
        image_of_text: (T,), the image among this worker's images that each text belongs to.
    """
    parts = gather((images.cpu(), texts.cpu(), image_of_text.cpu()), context)
    offsets = [0, *torch.tensor([len(part[0]) for part in parts]).cumsum(0).tolist()]
    all_images = torch.cat([part[0] for part in parts if len(part[0])])
    all_texts = torch.cat([part[1] for part in parts if len(part[1])])
    owners = torch.cat([part[2] + offset for part, offset in zip(parts, offsets, strict=False)])
    numbers = torch.arange(offsets[context.rank], offsets[context.rank + 1])
    of_images = [found_by(rows, all_texts, n[:, None] == owners) for rows, n in _blocks(images.cpu(), numbers)]
    own = image_of_text.cpu() + offsets[context.rank]
    of_texts = [found_by(rows, all_images, n[:, None] == torch.arange(len(all_images))) for rows, n in _blocks(texts.cpu(), own)]
    result = {}
    for way, ranks in (("image_to_text", of_images), ("text_to_image", of_texts)):
        every = torch.cat([each for part in gather(ranks, context) for each in part])
        result |= {f"{way}_recall@{k}": float((every < k).double().mean()) for k in KS}
    return result


def found_by(queries: Tensor, others: Tensor, own: Tensor) -> Tensor:
    """How many of the `others` (M, D) that are not a query's own are at least as similar to it as its best own one: (N,).

    Its own is then among the first k if this is less than k. Equally similar ones count against the query: embeddings that are
    all the same find nothing.

    Args:
        queries: (N, D).
        others: (M, D).
        own: (N, M) of bool, which of the others belong to each query: at least one.
    """
    similarities_NM = queries @ others.T
    best = similarities_NM.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return ((similarities_NM >= best) & ~own).sum(1)


def _blocks(rows: Tensor, numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and their numbers, in blocks that bound the memory of their similarities; none without rows."""
    return list(zip(rows.split(BLOCK), numbers.split(BLOCK), strict=True)) if len(numbers) else []
