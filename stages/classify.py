"""Stage `classify`: a classifier of the data of `guide`, the backbone with a new head, in `models/classify`."""

from pipelines.workflow import tasks
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main() -> None:
    """Trains the classifier before its guidance."""
    with stage() as params:
        train_stage(tasks.classify(params))


if __name__ == "__main__":
    main()
