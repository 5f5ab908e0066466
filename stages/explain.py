"""Stage `explain`: stores the teacher's logits and maps of the training images in `data/explanations`."""

from pipelines.storage.files import write
from pipelines.workflow.places import STORED_EXPLANATIONS
from pipelines.workflow.running import stage


def main() -> None:
    """Stores the explanations if a run of `distill.runs` learns from frozen ones, otherwise a note."""
    with stage() as params:
        STORED_EXPLANATIONS.mkdir(parents=True, exist_ok=True)
        if not any(getattr(params.distill, run).explanations == "frozen" for run in params.distill.runs):
            write(STORED_EXPLANATIONS / "none.txt", b"no run of distill.runs has frozen explanations\n")
            return
        # Imported here, because a stage with nothing to do need not wait seconds for PyTorch
        from pipelines.workflow.storing import store

        store(params, STORED_EXPLANATIONS)


if __name__ == "__main__":
    main()
