"""Stage `fetch DATASET`: downloads or generates a data set and verifies it, to `data/raw/DATASET`."""

import sys
from pathlib import Path

from pipelines.data import sources
from pipelines.params import keyed
from pipelines.storage.paths import run_directory
from pipelines.workflow.running import stage


def main(name: str) -> None:
    """Fetches the data set called `name` in the params."""
    with stage() as params:
        dataset = params.datasets[name]
        origin = dataset.model_dump(mode="json", exclude={"shard_size", "val_count", "split_seed"})
        # Outside the stage's outputs, which DVC deletes before it runs the stage again: partial downloads are
        # kept.
        cache = Path(run_directory("runs", f"fetch-{name}", origin))
        with keyed(f"datasets.{name}", dataset):
            sources.get(dataset).fetch(Path("data/raw", name), cache)


if __name__ == "__main__":
    main(sys.argv[1])
