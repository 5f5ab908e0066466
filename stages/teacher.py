"""Stage `teacher`: the model that students learn from, in `models/teacher`, wherever it is from."""

from pathlib import Path

from pipelines import models, tracking
from stages.common import stage

OUT = Path("models/teacher")


def main() -> None:
    """Brings the teacher of the params: from a folder (or a file in one), or from the registry; anew where an alias moved."""
    with stage() as params:
        source = params.distill.teacher
        if not source.startswith("models:/"):
            source = str(Path(source).parent if Path(source).is_file() else source)
        models.save(OUT, *tracking.load(source))


if __name__ == "__main__":
    main()
