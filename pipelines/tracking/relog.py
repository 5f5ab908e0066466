"""`python -m pipelines.tracking.relog RUN_DIRECTORY...`: logs runs that the tracking server missed.

A search is logged with its trials. Safe to repeat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.tracking.journal import Journal
from pipelines.tracking.runs import children, log
from pipelines.tracking.server import tracking_uri


def main(arguments: Sequence[str] | None = None) -> int:
    """Logs each run directory to `MLFLOW_TRACKING_URI`; returns the number of runs that it could not log."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tracking.relog", description=__doc__)
    parser.add_argument(
        "directories", nargs="+", metavar="RUN_DIRECTORY", help="such as runs/pretrain/0123456789ab"
    )
    failed = 0
    for directory in parser.parse_args(arguments).directories:
        journal = Journal(directory)
        if not journal.exists:
            there = (journal.root / "run.json").is_file()
            why = "tracking/run.json is unreadable: run the stage again" if there else "no tracking/run.json"
            print(f"{directory}: nothing was tracked here ({why})", file=sys.stderr)
            failed += 1
            continue
        for each in (journal, *children(directory)):
            each.update(warned=False)
            failed += log(each, tracking_uri()) is None
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
