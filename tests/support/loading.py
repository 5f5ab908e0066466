"""Toy shards, and the loader on them."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.data.loading.loader import loader
from pipelines.data.loading.sampling import Sampling
from pipelines.data.shards.writer import write_shards
from pipelines.distributed import Context
from pipelines.params import DataParams
from tests.support.toy_source import SIDE, ToySource

COUNT, SHARD_SIZE = 23, 5
DATA = DataParams(image_size=SIDE, augment="pad_crop_flip", crop_padding=2, shuffle_buffer=6)
SAMPLING = Sampling(batch_size=3, rank=0, world_size=1, train=True, seed=0, epoch=0, shuffle_buffer=6)


def write(out, samples, *, shard_size=SHARD_SIZE, task="multiclass"):
    write_shards(ToySource({"train": samples}, task), Path("raw"), out, shard_size=shard_size, progress=False)
    return str(out)


def evaluate(
    root, *, batch_size=4, workers=0, on_error="raise", verify=False, rank=0, world_size=1, **options
):
    data = DATA.model_copy(update={"loader_workers": workers, "on_error": on_error, "verify": verify})
    return loader(root, "train", data, batch_size, context=Context(rank, world_size), **options)


def train(root, *, batch_size=3, world_size=1, **options):
    """Returns a rank's batches of training. `batch_size` is per rank."""
    return evaluate(root, batch_size=batch_size * world_size, world_size=world_size, train=True, **options)


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def assert_same(some, others):
    """Asserts that batches are equal, bit for bit and in all fields."""
    some, others = list(some), list(others)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name
