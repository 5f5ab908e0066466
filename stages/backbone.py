"""Stage `backbone`: the model whose features the classifier to be guided starts from, in `models/backbone`."""

from pathlib import Path

from pipelines.workflow.places import save_model_from
from pipelines.workflow.running import stage


def main() -> None:
    """Saves the backbone of the params here, anew if its alias in the registry has moved."""
    with stage() as params:
        save_model_from(params.guide.backbone, Path("models/backbone"))


if __name__ == "__main__":
    main()
