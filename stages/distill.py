"""Stage `distill RUN`: trains a student of the teacher in `models/teacher`, to `models/distill/RUN`.

RUN is `kd` (logits alone) or `e2kd` (logits and explanations).
"""

import sys

from pipelines.workflow import tasks
from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main(run: str) -> None:
    """Trains the student if `distill.runs` lists its run."""
    with stage() as params:
        if run in params.distill.runs:
            train_stage(tasks.distill(params, run))
        else:
            leave_out(f"distill/{run}", "distill.runs")


if __name__ == "__main__":
    main(sys.argv[1])
