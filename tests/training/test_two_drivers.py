"""Two drivers of one run, or an old worker group beside a new one: only one goes on, undisturbed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.storage import lease
from pipelines.storage.errors import StorageError
from pipelines.storage.lease import LeaseError, held, writer
from pipelines.training import Context, Job, Result, checkpoints, train
from pipelines.training.loop import fit
from tests.support.toy import accident, identical, toy_batches, toy_job, weights


def pausing(at: int, meanwhile: Callable[[], None]) -> Callable[..., Any]:
    """Returns `toy_batches`, which calls `meanwhile` once, before the `at`-th training batch."""
    given = iter(range(1, 1000))

    class Pausing(list[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                if next(given) == at:
                    meanwhile()
                yield batch

    def batches(job: Job, split: str, **place: Any) -> Any:
        found = toy_batches(job, split, **place)
        return Pausing(found) if split == "train" else found

    return batches


def elsewhere(function: Callable[[], Any]) -> Any:
    """Calls the function in a thread of its own, as another driver; returns or raises what it does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("place", ["{}/run", "memory://drivers{}"])
def test_the_second_driver_is_refused_and_the_first_one_ends_as_if_alone(
    tmp_path: Path, uninterrupted: Result, place: str
) -> None:
    directory, refused = place.format(tmp_path), []

    def second() -> None:
        with pytest.raises(LeaseError, match="in use by") as caught:
            elsewhere(lambda: train(toy_job(directory)))
        refused.append(str(caught.value))

    result = train(replace(toy_job(directory), batches=pausing(9, second)))
    assert len(refused) == 1
    assert "\n" not in refused[0]
    assert identical(weights(result), weights(uninterrupted))
    assert train(toy_job(directory)) == result  # the first driver has released its lease


def test_a_driver_that_was_taken_for_dead_stops_and_its_successor_ends_as_if_alone(
    tmp_path: Path, uninterrupted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, ended = str(tmp_path / "run"), []

    def succeed() -> None:
        monkeypatch.setattr(lease, "_alive", set())
        ended.append(elsewhere(lambda: train(toy_job(directory))))

    with pytest.raises(LeaseError, match=r"^[^\n]*: taken over by [^\n]*; this driver stops here$"):
        train(replace(toy_job(directory), batches=pausing(9, succeed)))
    assert identical(weights(ended[0]), weights(uninterrupted))
    assert train(toy_job(directory)) == ended[0]


def test_a_worker_group_beside_its_successor_cannot_write(tmp_path: Path, uninterrupted: Result) -> None:
    """Ray may leave rank 0 of an old group training while the new group trains, under the same driver."""
    directory = str(tmp_path / "run")
    with held(directory) as driver:
        job = replace(toy_job(directory), owner=driver.owner)
        ended = []
        old = replace(job, batches=pausing(9, lambda: ended.append(fit(Context(), job))))
        with pytest.raises(StorageError, match="a newer worker group of the same driver writes here now"):
            fit(Context(), old)
    result = train(toy_job(directory))
    assert result.history == ended[0]
    assert identical(weights(result), weights(uninterrupted))


def test_a_worker_group_started_again_goes_on_under_the_same_driver(
    tmp_path: Path, uninterrupted: Result
) -> None:
    directory = str(tmp_path / "run")
    with held(directory) as driver:
        job = replace(toy_job(directory), owner=driver.owner)
        for step in (3, 8):
            with pytest.raises(ConnectionError):
                fit(Context(), replace(job, build=accident("raise", step, tmp_path / f"marker-{step}")))
        fit(Context(), job)
        driver.check()
    assert identical(weights(train(toy_job(directory))), weights(uninterrupted))


STATE = {"model": {"a": torch.ones(3)}}


def tokens_of(directory: str) -> set[tuple[int, int]]:
    """Returns (number of the token, step) of each checkpoint."""
    return {(folder.number, folder.step) for folder in checkpoints._folders(directory)}


@pytest.mark.parametrize("place", ["{}/run", "memory://fence{}"])
def test_no_writer_touches_the_checkpoints_of_a_later_one(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = place.format(tmp_path)
    with held(directory) as driver, writer(directory, driver.owner) as old:
        for step in (1, 2, 3):
            checkpoints.save(directory, step, STATE, {"epoch": step}, set(), 2, old)
        with writer(directory, driver.owner) as new:
            checkpoints.save(directory, 2, STATE, {"epoch": 20}, set(), 1, new)
            assert tokens_of(directory) == {(new.number, 2)}
            for step in (2, 4):
                with pytest.raises(StorageError, match="newer worker group"):
                    checkpoints.save(directory, step, STATE, {"epoch": -1}, set(), 1, old)
            # The old writer may have checked its lease before the new one came, and write afterwards.
            monkeypatch.setattr(lease.Lease, "check_newest", lambda self: None)
            checkpoints.save(directory, 2, STATE, {"epoch": -1}, set(), 1, old)
            checkpoints.save(directory, 9, STATE, {"epoch": -1}, set(), 1, old)
            monkeypatch.undo()
            summary = checkpoints.newest(directory)
            assert summary is not None
            assert (summary["step"], summary["epoch"]) == (2, 20)
            checkpoints.save(directory, 3, STATE, {"epoch": 30}, set(), 2, new)
            # No checkpoint of the old writer is left.
            assert tokens_of(directory) == {(new.number, 2), (new.number, 3)}


def test_checkpoints_of_earlier_versions_are_gone_on_with(tmp_path: Path, uninterrupted: Result) -> None:
    with pytest.raises(ConnectionError):
        train(toy_job(tmp_path / "run", accident("raise", 9, tmp_path / "marker")))
    for folder in (tmp_path / "run/checkpoints").iterdir():
        folder.rename(folder.with_name(folder.name[:13]))
    assert checkpoints.newest(str(tmp_path / "run")) is not None
    seen: list[Any] = []
    job = replace(
        toy_job(tmp_path / "run"),
        batches=pausing(1, lambda: seen.append(checkpoints.newest(str(tmp_path / "run")))),
    )
    assert identical(weights(train(job)), weights(uninterrupted))
    assert seen[0]["step"] == 8


def test_threads_do_not_share_a_lease(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def drive() -> None:
        with held(str(tmp_path)):
            entered.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        driving = pool.submit(drive)
        entered.wait(60)
        with pytest.raises(LeaseError, match="in use by"), held(str(tmp_path)):
            pass
        leave.set()
        driving.result()
    with held(str(tmp_path)):
        pass
