"""Stage `shard DATASET`: packs `data/raw/DATASET` into WebDataset tars, in `data/shards/DATASET`."""

import logging
import sys
from pathlib import Path

from pipelines.data import sources
from pipelines.data.shards.writer import write_shards
from pipelines.process import cpu_count
from pipelines.workflow.running import stage

log = logging.getLogger(__name__)


def main(name: str) -> None:
    """Writes the shards and the manifest of the data set called `name` in the params."""
    with stage() as params:
        dataset, out = params.datasets[name], Path("data/shards", name)
        source = sources.get(dataset)
        written = write_shards(
            source, Path("data/raw", name), out, shard_size=dataset.shard_size, workers=cpu_count()
        )
        counts = {
            split: sum(shard["count"] for shard in shards) for split, shards in written["splits"].items()
        }
        log.info("%s: samples: %s", out, ", ".join(f"{split} {count}" for split, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1])
