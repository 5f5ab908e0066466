"""Stage `bcosify START`: trains a B-cos network from START and saves it to `models/bcosify/START`.

START is `pretrained` (B-cosify the model of the stage `pretrain`) or `scratch` (random weights).
"""

import sys

from pipelines.workflow import tasks
from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main(start: str) -> None:
    """Trains the B-cos network if `bcosify.starts` lists its start."""
    with stage() as params:
        if start in params.bcosify.starts:
            train_stage(tasks.bcosify(params, start))
        else:
            leave_out(f"bcosify/{start}", "bcosify.starts")


if __name__ == "__main__":
    main(sys.argv[1])
