"""Stage `teacher`: the model that students learn from, in `models/teacher`, wherever it is from."""

from pathlib import Path

from pipelines.workflow.running import bring, stage


def main() -> None:
    """Brings the teacher of the params; anew where an alias in the registry moved."""
    with stage() as params:
        bring(params.distill.teacher, Path("models/teacher"))


if __name__ == "__main__":
    main()
