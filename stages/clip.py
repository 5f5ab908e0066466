"""Stage `clip TOWER`: the B-cosified image tower of `models/image_text/TOWER` beside its text tower, in `models/clip/TOWER`."""

import sys

from pipelines.workflow import tasks
from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main(tower: str) -> None:
    """B-cosifies the image tower of `cnn` or `vit`, if `clip.towers` has it."""
    with stage() as params:
        if tower in params.clip.towers:
            train_stage(tasks.clip(params, tower))
        else:
            leave_out(f"clip/{tower}", "clip.towers")


if __name__ == "__main__":
    main(sys.argv[1])
