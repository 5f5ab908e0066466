"""Computes and stores the teacher's logits and maps of a whole split, on the fixed evaluation view.

Shapes: N images, K classes, C channels, H x W pixels, h x w cells of a stored map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import models
from pipelines.attribution import Explainer, comparable_explainers
from pipelines.bcos import add_inverse
from pipelines.bcos.precision import exact_float32
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import Shard, read_manifest
from pipelines.data.shards.stored_explanations import Origin, finished_shards, write_index, write_shard
from pipelines.distributed import Context, gather
from pipelines.models import read_spec
from pipelines.params import DataParams, FrozenParams


def origin_of(teacher: str, shards: str, data: DataParams, frozen: FrozenParams, student_kind: str) -> Origin:
    """Returns all that the explanations of `teacher` for a student of `student_kind` depend on.

    They are dynamic weights if teacher and student are B-cos networks, otherwise GradCAM maps.
    """
    held = student_kind == read_spec(teacher).kind == "bcos"
    return Origin(
        teacher=models.digest(teacher),
        images=read_manifest(shards).digest,
        maps="dynamic_weights" if held else "gradcam",
        image_size=data.image_size,
        eval_resize=data.eval_resize,
        resolution=frozen.resolution or data.image_size,
        precision=frozen.precision,
    )


@exact_float32()
def store_explanations(
    context: Context,
    teacher: str,
    shards: str,
    data: DataParams,
    origin: Origin,
    out: str,
    subset: Sequence[int] | None = None,
    split: str = "train",
    batch_size: int = 64,
) -> int:
    """Stores the teacher's explanations of the classes it predicts; returns the number of images.

    Shards that an earlier call has finished are kept, so a killed stage resumes, also with another number of
    workers.

    Args:
        context: rank, number of workers and device. Worker `rank` takes every `world_size`-th shard.
        teacher: folder of the teacher.
        shards: root of the shards of images.
        data: params of the fixed view, see `eval_transform`.
        origin: see `origin_of`.
        out: folder or fsspec URL to write to. Later calls with the same `out` must have the same arguments.
        subset: numbers of the images in the split to explain; `None` for all.
        split: name of the split.
        batch_size: images per batch.
    """
    model, spec = models.load(teacher)
    model.to(context.device).requires_grad_(False)
    probe = torch.full((1, 6, spec.image_size, spec.image_size), 0.5, device=context.device)
    explain, _ = comparable_explainers(model, model, probe, held=origin.maps == "dynamic_weights")
    of_split = read_manifest(shards).shards(split)
    ends = list(accumulate(shard.count for shard in of_split))
    mine = list(zip(of_split, ends, strict=True))[context.rank :: context.world_size]
    finished = finished_shards(out, [shard.name for shard, _ in mine])
    written: list[Shard] = []
    for shard, end in mine:
        if shard.name in finished:
            written.append(finished[shard.name])
            continue
        inside = range(end - shard.count, end)
        numbers = list(inside) if subset is None else [number for number in subset if number in inside]
        alone = Context(device=context.device)  # workers share out shards, not the batches of a shard
        batches = loader(shards, split, data, batch_size, context=alone, subset=numbers, fields=())
        written.append(write_shard(out, shard.name, _explained(model, explain, batches, origin)))
    everywhere = [shard for part in gather(written, context) for shard in part]
    if context.rank == 0:
        write_index(out, origin, everywhere)
    return sum(shard.count for shard in everywhere)


def _explained(
    model: nn.Module, explain: Explainer, batches: Iterable[dict[str, Any]], origin: Origin
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields the key, the logits (K,) in float32 and the map (C, h, w) of each image, as they are stored."""
    for batch in batches:
        logits, maps = explain(model, add_inverse(batch["image"]))
        stored = scaled(maps if maps.ndim == 4 else maps.unsqueeze(1), origin.resolution)
        stored = stored.to(getattr(torch, origin.precision))
        yield from zip(batch["key"], logits.detach().float().cpu(), stored.cpu(), strict=True)


def scaled(maps: Tensor, resolution: int) -> Tensor:
    """Pools maps (N, C, H, W) to `resolution` x `resolution` cells, divided by their largest |value|."""
    if maps.shape[-1] != resolution:
        maps = F.adaptive_avg_pool2d(maps, resolution)
    return maps.detach() / maps.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
