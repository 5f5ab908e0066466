"""Stage `guide`: trains the classifier with boxes that guide its explanations, to `models/guide`."""

from pipelines.workflow import tasks
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main() -> None:
    """Trains the classifier with guidance."""
    with stage() as params:
        train_stage(tasks.guide(params))


if __name__ == "__main__":
    main()
