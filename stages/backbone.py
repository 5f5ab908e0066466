"""Stage `backbone`: saves the model from which the guided classifier starts to `models/backbone`."""

from pathlib import Path

from pipelines.workflow.places import take_model
from pipelines.workflow.running import stage


def main() -> None:
    """Saves the model that `guide.backbone` names. An alias of the registry is resolved each time."""
    with stage() as params:
        take_model(params.guide.backbone, Path("models/backbone"))


if __name__ == "__main__":
    main()
