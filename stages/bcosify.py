"""Stage `bcosify START`: the B-cos network made from the pretrained model, or from scratch, in `models/bcosify/START`."""

import sys

from pipelines.workflow import tasks
from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main(start: str) -> None:
    """Trains the B-cos network that starts `pretrained` or from `scratch`, if `bcosify.starts` has it."""
    with stage() as params:
        if start in params.bcosify.starts:
            train_stage(tasks.bcosify(params, start))
        else:
            leave_out(f"bcosify/{start}", "bcosify.starts")


if __name__ == "__main__":
    main(sys.argv[1])
