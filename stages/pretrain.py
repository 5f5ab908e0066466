"""Stage `pretrain`: trains the conventional model and saves it to `models/pretrain`."""

from pipelines.workflow import tasks
from pipelines.workflow.running import stage
from pipelines.workflow.training import train_stage


def main() -> None:
    """Trains the conventional model."""
    with stage() as params:
        train_stage(tasks.pretrain(params))


if __name__ == "__main__":
    main()
