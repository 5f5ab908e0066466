"""Stage `guide`: the classifier trained on, its explanations guided onto the objects by boxes, in `models/guide`."""

from pipelines.workflow import tasks
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main() -> None:
    """Guides the classifier."""
    with stage() as params:
        train_stage(tasks.guide(params))


if __name__ == "__main__":
    main()
