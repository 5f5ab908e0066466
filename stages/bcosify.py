"""Stage `bcosify START`: trains a B-cos network from START and saves it to `models/bcosify/START`.

START is `pretrained` (B-cosify the model of the stage `pretrain`) or `scratch` (random weights).
"""

import sys

from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage


def main(start: str) -> None:
    """Trains the B-cos network if `bcosify.starts` lists its start."""
    with stage() as params:
        if start not in params.bcosify.starts:
            leave_out(f"bcosify/{start}", "bcosify.starts")
            return
        # Imported here, because a stage that is left out need not wait seconds for PyTorch
        from pipelines.workflow import tasks
        from pipelines.workflow.training import train_stage

        train_stage(tasks.bcosify(params, start))


if __name__ == "__main__":
    main(sys.argv[1])
