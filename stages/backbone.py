"""Stage `backbone`: the model whose features the classifier to be guided starts from, in `models/backbone`."""

from pathlib import Path

from pipelines.workflow.running import bring, stage


def main() -> None:
    """Brings the backbone of the params; anew where an alias in the registry moved."""
    with stage() as params:
        bring(params.guide.backbone, Path("models/backbone"))


if __name__ == "__main__":
    main()
