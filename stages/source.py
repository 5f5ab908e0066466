"""Stage `source DATASET`: the code that reads the data set, with the sha256 of each file, in `data/code/DATASET.json`."""

import hashlib
import json
import sys
from pathlib import Path

from pipelines.workflow.identity import ROOT, code_files
from pipelines.workflow.running import stage


def main(name: str) -> None:
    """Writes down the code that the data set called `name` depends on, without the code of other data sets."""
    with stage() as params:
        files = code_files(f"pipelines.data.sources.{params.datasets[name].source}")
        found = {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        out = Path("data/code", f"{name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
