"""Stage `fetch DATASET`: download or generate it, verify it, leave it with a manifest in `data/raw/DATASET`."""

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
        cache = Path(
            run_directory("runs", f"fetch-{name}", origin)
        )  # partial downloads outlive the stage's outputs
        with keyed(f"datasets.{name}", dataset):
            sources.get(dataset).fetch(Path("data/raw", name), cache)


if __name__ == "__main__":
    main(sys.argv[1])
