"""Stage `explain`: the teacher's logits and maps of the training images, stored once, in `data/explanations`."""

from pathlib import Path

from pipelines.data.few_shot import few_shot
from pipelines.data.stored import Origin
from pipelines.explanations import origin_of, store_explanations
from pipelines.params import Params
from pipelines.training import launch
from stages.common import shards_of, stage

OUT = Path("data/explanations").absolute()


def main() -> None:
    """Stores what the runs with frozen explanations need; where there is none of them, nothing."""
    with stage() as params:
        OUT.mkdir(parents=True, exist_ok=True)
        if not any(getattr(params.distill, run).explanations == "frozen" for run in params.distill.runs):
            (OUT / "none.txt").write_text("no run of distill.runs has frozen explanations\n")
            return
        shards, teacher, shots = shards_of(params.dataset), str(Path("models/teacher").absolute()), params.distill.shots
        subset = None if shots is None else few_shot(shards, "train", shots, params.distill.shots_seed).numbers
        count = launch(
            *(store_explanations, teacher, shards, params.data, origin(params, teacher), str(OUT), subset),
            training=params.training,
        )
        size = sum(path.stat().st_size for path in OUT.iterdir())
        print(f"{count} explanations stored, {size / 2**20:.1f} MiB in all")


def origin(params: Params, teacher: str) -> Origin:
    """What the explanations of these params depend on."""
    return origin_of(teacher, shards_of(params.dataset), params.data, params.distill.frozen, params.distill.student.kind)


if __name__ == "__main__":
    main()
