"""A killed and resumed run ends with the same weights, bit for bit, as an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.training import Result, checkpoints, train
from tests.support.toy import accident, identical, toy_job, weights


# Before any checkpoint, within an epoch, and at both ends of an epoch.
@pytest.mark.parametrize("at_step", [1, 3, 6, 7, 9, 18])
@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_killed_and_run_again_is_as_never_killed(tmp_path: Path, at_step: int, schedule: str) -> None:
    whole = train(toy_job(tmp_path / "whole", schedule=schedule))
    broken = accident("raise", at_step, tmp_path / "marker")
    with pytest.raises(ConnectionError):
        train(toy_job(tmp_path / "broken", broken, schedule=schedule))
    resumed = train(toy_job(tmp_path / "broken", schedule=schedule))
    assert identical(weights(whole), weights(resumed))
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert one["epoch"] == other["epoch"]
        assert one["step"] == other["step"]
        rate = "train/images_per_second"
        assert {**one["metrics"], rate: 0} == {**other["metrics"], rate: 0}


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_how_often_checkpoints_are_written_changes_nothing(
    tmp_path: Path, uninterrupted: Result, every: int
) -> None:
    assert identical(
        weights(uninterrupted), weights(train(toy_job(tmp_path / "run", checkpoint_every=every)))
    )


def test_a_finished_run_is_not_trained_again_and_its_history_is_whole(tmp_path: Path) -> None:
    first = train(toy_job(tmp_path / "run"))
    (tmp_path / "run/history.json").write_text("[]")  # as if killed before the history was written
    again = train(toy_job(tmp_path / "run", accident("bug", 1, tmp_path / "marker")))
    assert again == first
    assert json.loads((tmp_path / "run/history.json").read_text()) == first.history


def test_a_checkpoint_without_its_marker_or_of_the_wrong_size_does_not_count(
    tmp_path: Path, uninterrupted: Result
) -> None:
    with pytest.raises(ConnectionError):
        train(toy_job(tmp_path / "run", accident("raise", 12, tmp_path / "marker"), keep_last=9))
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [folder.name[:13] for folder in folders][-2:] == ["step-00000008", "step-00000010"]
    state = folders[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    (folders[-2] / "complete.json").unlink()
    newest = checkpoints.newest(str(tmp_path / "run"))
    assert newest is not None
    assert newest["step"] == 6
    assert identical(weights(uninterrupted), weights(train(toy_job(tmp_path / "run"))))


def test_training_draws_the_same_numbers_whatever_the_loader_draws(
    tmp_path: Path, uninterrupted: Result
) -> None:
    from tests.support.toy import drawing_batches

    job = toy_job(tmp_path / "run")
    assert identical(
        weights(uninterrupted), weights(train(type(job)(**{**vars(job), "batches": drawing_batches})))
    )


def test_history_is_written_as_json(tmp_path: Path) -> None:
    result = train(toy_job(tmp_path / "run"))
    assert json.loads((tmp_path / "run/history.json").read_text()) == result.history
    assert [record["epoch"] for record in result.history] == [1, 2, 3]
    assert [record["step"] for record in result.history] == [6, 12, 18]
