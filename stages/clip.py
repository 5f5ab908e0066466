"""Stage `clip TOWER`: B-cosifies the image tower in `models/image_text/TOWER`.

Saves it, with the text tower, to `models/clip/TOWER`. TOWER is `cnn` or `vit`.
"""

import sys

from pipelines.workflow.reports import leave_out
from pipelines.workflow.running import stage


def main(tower: str) -> None:
    """B-cosifies the image tower if `clip.towers` lists it."""
    with stage() as params:
        if tower not in params.clip.towers:
            leave_out(f"clip/{tower}", "clip.towers")
            return
        # Imported here, because a stage that is left out need not wait seconds for PyTorch
        from pipelines.workflow import tasks
        from pipelines.workflow.training import train_stage

        train_stage(tasks.clip(params, tower))


if __name__ == "__main__":
    main(sys.argv[1])
