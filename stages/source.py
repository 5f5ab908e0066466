"""Stage `source DATASET`: the code that reads the data set, with the sha256 of each file, in `data/code/DATASET.json`."""

import sys
from pathlib import Path

from pipelines.data import sources
from pipelines.storage.files import file_digest, write_json
from pipelines.workflow.identity import ROOT, code_files
from pipelines.workflow.running import stage


def main(name: str) -> None:
    """Writes down the code that the data set called `name` depends on, without the code of other data sets."""
    with stage() as params:
        files = code_files(*sources.modules(params.datasets[name]))
        write_json(
            Path("data/code", f"{name}.json"),
            {path.relative_to(ROOT).as_posix(): file_digest(path) for path in files},
        )


if __name__ == "__main__":
    main(sys.argv[1])
