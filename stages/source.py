"""Stage `source DATASET`: lists the code that reads the data set, in `data/code/DATASET.json`.

The list has the sha256 of each file. `fetch` and `shard` depend on it, not on the code of other data sets.
"""

import sys
from pathlib import Path

from pipelines.data import sources
from pipelines.storage.files import file_digest, write_json
from pipelines.workflow.identity import ROOT, code_files
from pipelines.workflow.running import stage


def main(name: str) -> None:
    """Lists the code that the data set called `name` in the params depends on."""
    with stage() as params:
        files = code_files(*sources.modules(params.datasets[name]))
        write_json(
            Path("data/code", f"{name}.json"),
            {path.relative_to(ROOT).as_posix(): file_digest(path) for path in files},
        )


if __name__ == "__main__":
    main(sys.argv[1])
