"""Stage `classify`: trains the backbone with a new head on the data of `guide`, to `models/classify`."""

from pipelines.workflow import tasks
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main() -> None:
    """Trains the classifier, before its guidance."""
    with stage() as params:
        train_stage(tasks.classify(params))


if __name__ == "__main__":
    main()
