"""`python -m infra.job`: the entry point of a submitted job, in its working directory on the cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipelines.data.shards.sample import DataError
from pipelines.storage.errors import one_line
from pipelines.workflow.submitted_job import PLACE, deliver, pull_inputs, read_order


def main() -> int:
    """Fetches the inputs, runs the stages and publishes their outputs.

    Returns 0, or the exit status of the first stage that fails.
    """
    try:
        order = read_order(Path())
        pull_inputs(order.inputs, Path())
    except OSError as error:
        sys.exit(f"the job's inputs do not get here: {one_line(error)}")
    told = os.environ | order.environment | {PLACE: order.place}
    for stage in order.stages:
        print(f"stage {stage.name}: {stage.command}", flush=True)
        if status := subprocess.call(stage.command, shell=True, env=told):
            return status
    try:
        # The journals of tracked runs, because these may be on no server and this directory is temporary.
        tracked = [str(path) for path in Path("runs").glob("**/tracking")]
        deliver(order, [*(path for stage in order.stages for path in stage.outputs), *tracked])
    except (OSError, DataError) as error:
        sys.exit(f"the outputs do not get to {order.place}: {one_line(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
