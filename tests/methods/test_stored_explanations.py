"""Stored explanations equal the teacher's live explanations on the fixed view."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipelines import models, params
from pipelines.bcos import add_inverse
from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.stored_explanations import finished_shards
from pipelines.methods import build_e2kd, stored_explanations
from pipelines.methods.stored_explanations import origin_of, store_explanations
from pipelines.models import ModelSpec
from pipelines.params import DataParams, DistillationParams, FrozenParams, StudentParams, TrainingParams
from pipelines.training import Context, Job, checkpoints, shard_batches, train
from tests.support.drawn import CLASSES, drawn_shards
from tests.support.method_params import method_params

SIDE = 16
DATA = DataParams(image_size=SIDE, augment="none")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("frozen")
    found = {"shards": drawn_shards(folder, 17, image_size=SIDE, counts={"train": 40, "val": 10, "test": 10})}
    for kind in ("bcos", "conventional"):
        torch.manual_seed(0)
        spec = ModelSpec("resnet8", CLASSES, SIDE, kind, options={"width": 4})  # type: ignore[arg-type]
        model = models.assemble(spec).train()
        model(add_inverse(torch.rand(64, 3, SIDE, SIDE)))
        models.save(folder / kind, model, spec)
        found[kind] = str(folder / kind)
    return found


def store(made: dict[str, str], out: Path, kind: str, frozen: FrozenParams, subset: Any = None) -> str:
    origin = origin_of(made[kind], made["shards"], DATA, frozen, kind)
    store_explanations(Context(), made[kind], made["shards"], DATA, origin, str(out), subset, batch_size=7)
    return str(out)


def job_of(
    made: dict[str, str],
    kind: str,
    directory: Path,
    stored: str | None,
    data: DataParams = DATA,
    **values: Any,
) -> Job:
    explanations = "live" if stored is None else "frozen"
    settings = {"explanation_weight": 1.0, "explanations": explanations, **values}
    optim = method_params(DistillationParams, **settings)
    student = StudentParams(name="resnet8", options={"width": 4}, kind=kind)  # type: ignore[arg-type]
    spec = ModelSpec("resnet8", CLASSES, SIDE, kind, options={"width": 4})  # type: ignore[arg-type]
    return Job(
        build=partial(build_e2kd, student, spec, Path(made[kind]), optim, 0),
        shards=made["shards"],
        data=data,
        params=optim,
        training=TrainingParams(workers=0),
        seed=0,
        directory=str(directory),
        explanations=stored,
    )


@pytest.mark.parametrize("kind", ["bcos", "conventional"])
@pytest.mark.parametrize(("precision", "least"), [("float32", 1 - 1e-6), ("float16", 1 - 1e-5)])
def test_frozen_are_the_live_ones_on_the_fixed_view(
    made: dict[str, str], tmp_path: Path, kind: str, precision: Any, least: float
) -> None:
    stored = store(made, tmp_path / "stored", kind, FrozenParams(precision=precision))
    jobs = [job_of(made, kind, tmp_path / "run", root) for root in (None, stored)]
    live, frozen = (job.build() for job in jobs)
    pairs = zip(shard_batches(jobs[0], "train"), shard_batches(jobs[1], "train"), strict=True)
    count = 0
    for one, other in pairs:
        assert one["key"] == other["key"]
        taught, remembered = live.prepare(one), frozen.prepare(other)
        torch.testing.assert_close(remembered["teacher_logits"], taught["teacher_logits"])
        maps = [each["teacher_maps"].flatten(1) for each in (taught, remembered)]
        blank = maps[0].abs().amax(1) == 0  # GradCAM maps without positive values
        assert torch.equal(blank, maps[1].abs().amax(1) == 0)
        assert (cosine_similarity(*maps)[~blank] > least).all()
        count += len(one["key"])
    assert count == 40


def test_training_on_frozen_ones_is_training_on_live_ones_where_the_view_is_fixed(
    made: dict[str, str], tmp_path: Path
) -> None:
    stored = store(made, tmp_path / "stored", "bcos", FrozenParams(precision="float32"))
    live, frozen = (
        train(job_of(made, "bcos", tmp_path / name, root))
        for name, root in (("live", None), ("frozen", stored))
    )
    name = "train/explanation"
    assert frozen.history[0]["metrics"][name] == pytest.approx(live.history[0]["metrics"][name], abs=1e-4)
    weights = [
        checkpoints.load(result.directory, 5)["model"]["body.conv1.weight"] for result in (live, frozen)
    ]
    assert (weights[0] - weights[1]).abs().max() < 0.02


def test_a_coarser_map_is_smaller_and_still_points_the_same_way(made: dict[str, str], tmp_path: Path) -> None:
    whole = store(made, tmp_path / "whole", "bcos", FrozenParams())
    coarse = store(made, tmp_path / "coarse", "bcos", FrozenParams(resolution=4))
    sizes = [sum(path.stat().st_size for path in Path(root).glob("*.tar")) for root in (whole, coarse)]
    assert sizes[1] < sizes[0]
    jobs = [job_of(made, "bcos", tmp_path / "run", root) for root in (whole, coarse)]
    for one, other in zip(*(shard_batches(job, "train") for job in jobs), strict=True):
        fine, rough = one["teacher_maps"], other["teacher_maps"]
        assert fine.shape == rough.shape
        assert (cosine_similarity(fine.flatten(1), rough.flatten(1)) > 0).all()


def test_a_few_shot_subset_is_stored_alone_and_feeds_its_run(made: dict[str, str], tmp_path: Path) -> None:
    subset = few_shot(made["shards"], "train", 1, 0)
    stored = store(made, tmp_path / "stored", "bcos", FrozenParams(), subset.numbers)
    job = job_of(
        made,
        "bcos",
        tmp_path / "run",
        stored,
        DATA.model_copy(update={"augment": "pad_crop_flip"}),
        batch_size=5,
    )
    job = Job(**{**job.__dict__, "subset": subset.numbers})
    seen = [key for batch in shard_batches(job, "train") for key in batch["key"]]
    assert sorted(seen) == sorted(subset.keys)
    assert train(job).history[0]["metrics"]["train/explanation"] > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stage_that_was_killed_goes_on_with_its_finished_shards(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    whole = Path(store(made, tmp_path / "whole", "bcos", FrozenParams()))
    out, written, write_shard = tmp_path / "killed", [], stored_explanations.write_shard

    def killed_in_the_third(root: str, name: str, samples: Any) -> Any:
        written.append(name)
        if len(written) == 3:
            next(iter(samples))
            raise KeyboardInterrupt
        return write_shard(root, name, samples)

    monkeypatch.setattr(stored_explanations, "write_shard", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        store(made, out, "bcos", FrozenParams())
    assert not (out / "explanations.json").exists()
    assert written == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    for harm in (b"", (out / "train-000001.index.jsonl.gz").read_bytes()[:-3]):  # as after a crash
        (out / "train-000001.index.jsonl.gz").write_bytes(harm)
        assert set(finished_shards(str(out), written)) == {"train-000000.tar"}
    origin = origin_of(made["bcos"], made["shards"], DATA, FrozenParams(), "bcos")
    monkeypatch.setattr(
        stored_explanations, "gather", lambda value, context: gathered.append(value) or [*gathered]
    )
    gathered: list[Any] = []
    for rank in reversed(range(world_size)):  # rank 0, which writes the index, is last
        arguments = (made["bcos"], made["shards"], DATA, origin, str(out))
        count = store_explanations(Context(rank, world_size), *arguments, batch_size=7)
    assert sorted(written[3:]) == ["train-000001.tar", "train-000002.tar"]
    assert count == 40
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_frozen_ones_and_what_they_cannot_follow_are_refused_in_one_line() -> None:
    content = params.load().model_dump(mode="json")
    content["distill"]["e2kd"]["explanations"] = "frozen"
    content["data"]["rand_augment"] = 5
    with pytest.raises(
        params.ParamsError,
        match=r"^params: [^\n]*distill.e2kd.explanations: frozen ones do not follow[^\n]*$",
    ):
        params.validate(content)
    content["distill"]["e2kd"]["mixup"] = 0.2
    with pytest.raises(params.ParamsError, match=r"distill.e2kd: mixup: frozen explanations [^\n]*$"):
        params.validate(content)
