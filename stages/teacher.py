"""Stage `teacher`: the model that students learn from, in `models/teacher`."""

from pathlib import Path

from pipelines.workflow.places import save_model_from
from pipelines.workflow.running import stage


def main() -> None:
    """Saves the teacher of the params here, anew if its alias in the registry has moved."""
    with stage() as params:
        save_model_from(params.distill.teacher, Path("models/teacher"))


if __name__ == "__main__":
    main()
