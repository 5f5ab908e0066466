"""Stage `image_text TOWER`: an image tower and its text tower, as they come or trained on captions, in `models/image_text/TOWER`."""

import sys

from pipelines.workflow import tasks
from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main(tower: str) -> None:
    """Trains the pair of `cnn` or `vit`, if `clip.towers` has it."""
    with stage() as params:
        if tower in params.clip.towers:
            train_stage(tasks.image_text(params, tower))
        else:
            leave_out(f"image_text/{tower}", "clip.towers")


if __name__ == "__main__":
    main(sys.argv[1])
