"""Stage `image_text TOWER`: trains an image tower and its text tower on images with captions.

Saves both to `models/image_text/TOWER`. TOWER is `cnn` or `vit`.
"""

import sys

from pipelines.workflow import tasks
from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main(tower: str) -> None:
    """Trains the pair of towers if `clip.towers` lists it."""
    with stage() as params:
        if tower in params.clip.towers:
            train_stage(tasks.image_text(params, tower))
        else:
            leave_out(f"image_text/{tower}", "clip.towers")


if __name__ == "__main__":
    main(sys.argv[1])
