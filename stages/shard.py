"""Stage `shard DATASET`: `data/raw/DATASET` as WebDataset tars with a manifest in `data/shards/DATASET`."""

import os
import sys
from pathlib import Path

from pipelines.data import sources
from pipelines.data.shards.writer import write_shards
from pipelines.workflow.running import shards_of, stage


def main(name: str) -> None:
    """Shards the data set called `name` in the params."""
    with stage() as params:
        dataset = params.datasets[name]
        workers = os.cpu_count() or 1
        write_shards(
            sources.get(dataset), Path("data/raw", name), shards_of(name), shard_size=dataset.shard_size, workers=workers
        )


if __name__ == "__main__":
    main(sys.argv[1])
