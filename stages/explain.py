"""Stage `explain`: the teacher's logits and maps of the training images, stored once, in `data/explanations`."""

import uuid
from pathlib import Path

from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.stored_explanations import INDEX, Origin, read_index
from pipelines.methods import check_pair
from pipelines.methods.stored_explanations import origin_of, store_explanations
from pipelines.models import read_spec
from pipelines.params import Params
from pipelines.storage import files
from pipelines.storage.publish import pull
from pipelines.training import launch
from pipelines.workflow.running import model_for_all, seen_by_all, shards_for_all, shards_of, stage, student_spec

OUT = Path("data/explanations")


def main() -> None:
    """Stores what the runs with frozen explanations need; where there is none of them, nothing."""
    with stage() as params:
        OUT.mkdir(parents=True, exist_ok=True)
        if not any(getattr(params.distill, run).explanations == "frozen" for run in params.distill.runs):
            (OUT / "none.txt").write_text("no run of distill.runs has frozen explanations\n")
            return
        of_teacher = read_spec("models/teacher")
        check_pair(student_spec(params, read_manifest(shards_of(params.dataset)), of_teacher), of_teacher, explained=True)
        shards, teacher, shots = shards_for_all(params), str(Path("models/teacher").absolute()), params.distill.shots
        subset = None if shots is None else few_shot(shards, "train", shots, params.distill.shots_seed).numbers
        of_all = (model_for_all(params, Path(teacher)), shards, params.data, origin(params, teacher))
        out = f"{params.storage.root.rstrip('/')}/stored/{uuid.uuid4().hex}" if seen_by_all(params) else str(OUT.absolute())
        count = launch(store_explanations, *of_all, out, subset, training=params.training, storage=params.storage.root)
        if seen_by_all(params):
            take(out, OUT)
        size = sum(path.stat().st_size for path in OUT.iterdir())
        print(f"{count} explanations stored, {size / 2**20:.1f} MiB in all")


def take(url: str, folder: Path) -> None:
    """Moves the stored explanations at a URL to a folder here."""
    pull(url, folder, (*(shard["name"] for shard in read_index(url)["shards"]), INDEX))
    files.remove(url)


def origin(params: Params, teacher: str) -> Origin:
    """What the explanations of these params depend on."""
    return origin_of(teacher, shards_of(params.dataset), params.data, params.distill.frozen, params.distill.student.kind)


if __name__ == "__main__":
    main()
