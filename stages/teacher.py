"""Stage `teacher`: saves the model that students learn from to `models/teacher`."""

from pathlib import Path

from pipelines.workflow.places import take_model
from pipelines.workflow.running import stage


def main() -> None:
    """Saves the model that `distill.teacher` names. An alias of the registry is resolved each time."""
    with stage() as params:
        take_model(params.distill.teacher, Path("models/teacher"))


if __name__ == "__main__":
    main()
