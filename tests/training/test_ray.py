"""Workers under Ray Train: weights do not depend on who dies, metrics not on the number of workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.shards.writer import write_shards
from pipelines.params import DataParams, TrainingParams
from pipelines.training import Context, Job, Result, TrainingError, checkpoints, launch, train
from pipelines.training.job import shard_batches
from pipelines.training.launch import _check_cpus
from tests.support import toy
from tests.support.driver import run_until_killed
from tests.support.toy import (
    ALL_RANKS,
    COUNT,
    SteadyMethod,
    Unlucky,
    accident,
    addresses_of_ray,
    call_each,
    compile_and_accumulate,
    difference,
    evaluate_toy,
    fit_and_evaluate,
    gradients_of_epoch,
    identical,
    interrupt_and_evaluate,
    toy_batches,
    toy_job,
    weights,
)
from tests.support.toy_source import ToySource, plain
from tests.support.toy_student import distil_together, toy_student

pytestmark = pytest.mark.usefixtures("ray_workers")


def assert_evaluated_as_here(there: dict[str, Any], job: Job) -> None:
    """Checks that each key came once, and that metrics equal those of one worker.

    Counts and top-1 are exactly equal, other metrics to 1e-6.
    """
    here = evaluate_toy(Context(), job)
    assert sorted(there["keys"]) == sorted(here["keys"]) == [f"{number:04d}" for number in range(COUNT)]
    for name in ("count", "accuracy"):
        assert there["values"][name] == here["values"][name]
    assert there["values"] == pytest.approx(here["values"], rel=1e-6)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, ray_workers: None) -> Callable[[str], tuple[Any, Any]]:
    """Runs the jobs of several tests on the same two workers; returns name -> (jobs, results)."""
    folder = tmp_path_factory.mktemp("two")
    steady, drops = partial(SteadyMethod, norm=False), partial(SteadyMethod, dropout=0.3)
    broken = accident("raise", 9, rank=ALL_RANKS, method=SteadyMethod, dropout=0.3)
    builds: dict[str, Any] = {
        "plain": (steady, {}),
        "compiled": (steady, {"compile": True}),
        "parts": (steady, {"accumulate": 2}),
        "whole": (drops, {"compile": True}),
        "broken": (broken, {"compile": True}),
        "healed": (drops, {"compile": True}),
    }
    methods = {
        name: toy_job(
            folder / name.replace("healed", "broken"), method, workers=2, optimiser="sgd", lr=0.1, **params
        )
        for name, (method, params) in builds.items()
    }
    modes: dict[str, Any] = {"eager": {}, "compiled": {"compile": True}, "half": {"precision": "bfloat16"}}
    students = {
        name: toy_job(
            folder / f"student-{name}",
            toy_student,
            workers=2,
            optimiser="sgd",
            lr=0.05,
            clip="none",
            **params,
        )
        for name, params in modes.items()
    }
    job = toy_job(folder / "uninterrupted", workers=2)
    jobs = {fit_and_evaluate: job, compile_and_accumulate: methods, distil_together: students}
    found = launch(call_each, jobs, training=job.training, storage=str(folder))
    return {
        function.__name__: (jobs[function], result) for function, result in zip(jobs, found, strict=True)
    }.__getitem__


def test_a_worker_killed_in_mid_epoch_changes_nothing(tmp_path: Path, on_two: Any) -> None:
    whole, there = on_two("fit_and_evaluate")
    assert_evaluated_as_here(there, whole)
    broken = accident("kill", 9, tmp_path / "marker", rank=1)
    killed = train(toy_job(tmp_path / "killed", broken, workers=2))
    assert (tmp_path / "marker").exists()
    assert identical(checkpoints.load(whole.directory, 18)["model"], weights(killed))
    assert [record["epoch"] for record in killed.history] == [1, 2, 3]
    assert not list((tmp_path / "killed/ray").iterdir())  # Ray's own state is deleted


def test_three_workers_add_up_gradients_in_the_same_order_after_a_resume(tmp_path: Path) -> None:
    jobs = [
        toy_job(tmp_path / name, broken, workers=3, batch_size=12)  # 16 samples a rank: 4 steps an epoch
        for name, broken in (("whole", None), ("run", accident("raise", 6, rank=ALL_RANKS)), ("run", None))
    ]
    there = launch(interrupt_and_evaluate, *jobs, training=jobs[0].training, storage=jobs[0].directory)
    assert there.pop("same")
    assert_evaluated_as_here(there, jobs[0])


def test_three_workers_share_a_batch_unequally_also_if_one_has_no_image_left(tmp_path: Path) -> None:
    broken = (3, 4, 5, 6, 20, 21)
    images = [plain(i, image=b"no image") if i in broken else plain(i) for i in range(24)]
    write_shards(
        ToySource({"train": images, "val": images[:1]}),
        Path("raw"),
        tmp_path / "shards",
        shard_size=9,
        progress=False,
    )
    # Ranks have shares of 1, 1 and 2 images.
    job = toy_job(tmp_path / "run", partial(SteadyMethod, norm=False), workers=3, batch_size=4)
    data = DataParams(image_size=toy.SIDE, on_error="skip")
    job = replace(job, shards=str(tmp_path / "shards"), batches=shard_batches, data=data)
    normed = replace(job, build=SteadyMethod, directory=str(tmp_path / "normed"))
    jobs = {gradients_of_epoch: job, fit_and_evaluate: normed, addresses_of_ray: job}
    there, evaluated, (found, own) = launch(call_each, jobs, training=job.training, storage=str(tmp_path))
    here = gradients_of_epoch(Context(), replace(job, data=data))
    assert sum(there["images"]) == sum(here["images"]) == 18
    assert all(idle > 0 for idle in there["idle"][:2])  # rank 0 is among the idle ones
    assert there["gradient"] == pytest.approx(here["gradient"], rel=1e-4, abs=1e-6)
    assert evaluated["values"]["count"] == COUNT  # ranks wait for each other to share buffers
    assert found == own


def test_a_worker_that_no_node_has_cpus_for_is_refused() -> None:
    _check_cpus(TrainingParams(workers=64))  # only one of them must fit the largest node
    with pytest.raises(
        TrainingError,
        match=r"^cpus_per_worker: a worker with its loader's processes needs a node of 4097 CPUs",
    ):
        _check_cpus(TrainingParams().with_loader(4096))


def test_a_run_that_goes_on_may_fail_more_often_than_between_two_checkpoints(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "run", partial(Unlucky, str(tmp_path), (3, 9)), workers=1, max_failures=1)
    assert [record["step"] for record in train(job).history] == [6, 12, 18]
    assert sorted(path.name for path in tmp_path.glob("failed-at-*")) == ["failed-at-3", "failed-at-9"]
    never = toy_job(tmp_path / "never", partial(Unlucky, str(tmp_path), (5,)), workers=1, max_failures=0)
    with pytest.raises(
        TrainingError,
        match=r"^the workers failed more than 0 times without a new checkpoint: .*accident at 5",
    ):
        train(never)


@pytest.mark.compile
def test_two_workers_compile_resume_and_take_their_batch_in_parts(on_two: Any) -> None:
    _, found = on_two("compile_and_accumulate")
    assert found["resumed"]
    assert found["compiled"] < 1e-4
    assert found["parts"] < 1e-5


@pytest.mark.compile
def test_two_workers_distil_as_one_does_compiled_and_in_half_precision(tmp_path: Path, on_two: Any) -> None:
    jobs, found = on_two("distil_together")
    here = weights(train(toy_job(tmp_path / "here", toy_student, optimiser="sgd", lr=0.05, clip="none")))
    for name in ("eager", "compiled"):
        assert difference(here, checkpoints.load(jobs[name].directory, 18)["model"]) < 1e-4
    for first, last in found.values():
        assert last < first - 0.01


def test_an_error_that_a_restart_cannot_cure_ends_in_its_own_line(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "run", accident("bug", 9, tmp_path / "marker", rank=1), workers=2)
    with pytest.raises(TrainingError, match=r"^accident at 9$"):
        train(job)
    newest = checkpoints.newest(job.directory)
    assert newest is not None
    assert newest["step"] == 8
    asked = []

    def batches(job: Job, split: str, **place: Any) -> Any:
        asked.append((split, place.get("start_batch"), list(place.get("earlier", []))))
        return toy_batches(job, split, **place)

    # This process, another number of workers, resumes with the rest of the epoch.
    elsewhere = train(replace(toy_job(tmp_path / "run"), batches=batches))
    assert ("train", 2, [(2, 2)]) in asked
    assert [place for place in asked if place[2]] == [("train", 2, [(2, 2)])]
    assert [(record["epoch"], record["step"]) for record in elsewhere.history] == [(1, 6), (2, 12), (3, 18)]


def test_a_driver_killed_and_run_again_changes_nothing(tmp_path: Path, uninterrupted: Result) -> None:
    run_until_killed(f"""
from pipelines.training import train
folder = Path({str(tmp_path)!r})
train(toy.toy_job(folder / "run", toy.accident("kill driver", 9, folder / "marker"), workers=1))
""")
    newest = checkpoints.newest(str(tmp_path / "run"))
    assert newest is not None
    assert newest["step"] == 8
    again = train(toy_job(tmp_path / "run", workers=1))
    assert identical(weights(uninterrupted), weights(again))
