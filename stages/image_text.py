"""Stage `image_text TOWER`: trains an image tower and its text tower on images with captions.

Saves both to `models/image_text/TOWER`. TOWER is `cnn` or `vit`.
"""

import sys

from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage


def main(tower: str) -> None:
    """Trains the pair of towers if `clip.towers` lists it."""
    with stage() as params:
        if tower not in params.clip.towers:
            leave_out(f"image_text/{tower}", "clip.towers")
            return
        # Imported here, because a stage that is left out need not wait seconds for PyTorch
        from pipelines.workflow import tasks
        from pipelines.workflow.training import train_stage

        train_stage(tasks.image_text(params, tower))


if __name__ == "__main__":
    main(sys.argv[1])
