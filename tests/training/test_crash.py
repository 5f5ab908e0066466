"""A run that crashes at any write, by a kill or loss of power, resumes and ends with the same weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics

from pipelines.storage import files
from pipelines.storage.lease import held
from pipelines.tracking import runs
from pipelines.tracking.journal import Journal
from pipelines.training import Result, checkpoints, train
from tests.support.disk import Disk, Place
from tests.support.toy import CLASSES, ToyMethod, identical, toy_job, weights

SPEED = "train/images_per_second"


class OneFigure(ToyMethod):
    """Has only one metric, which saves time."""

    def metrics(self) -> torchmetrics.MetricCollection:
        accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=CLASSES, average="micro")
        return torchmetrics.MetricCollection({"accuracy": accuracy})


def execute(directory: Path) -> Result:
    """Trains and tracks in `directory` as a stage does: 3 epochs of 2 steps, with a checkpoint after each."""
    with (
        held(str(directory)),
        runs.stage_run("toy", experiment="demo", params={}, directory=directory) as run,
    ):
        sizes = {"epochs": 3, "batch_size": 24, "checkpoint_every": 1, "keep_last": 1}
        result = train(
            toy_job(directory, OneFigure, on_epoch=run.epoch_logger(), report_key=run.key, **sizes)
        )
        run.history(result.history)
        run.metrics({"test/accuracy": 0.5})
    return result


def figures(rows: Any) -> list[tuple[str, int, float]]:
    """Returns metric, step and value of each row, sorted, without the speed."""
    return sorted((row["key"], row["step"], row["value"]) for row in rows if row["key"] != SPEED)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns off the server, git, and fsync, which matters only if power is lost."""

    def away(*_: Any) -> None:
        raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr(runs, "sync", away)
    for name in ("version_tags", "git_tags"):
        monkeypatch.setattr(runs, name, dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def goes_on(tmp_path: Path, alone: None) -> Callable[[Place, Result, Journal], None]:
    """Returns a check that a run resumes from a crash and ends like an uninterrupted one."""
    directory = tmp_path / "again"

    def check(place: Place, whole: Result, journal: Journal) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        place.restore(directory)
        before = checkpoints.newest(str(directory))
        result = execute(directory)
        assert identical(weights(result), weights(whole)), place
        assert [record["step"] for record in result.history] == [2, 4, 6], place
        assert figures(Journal(directory).metrics()) == figures(journal.metrics()), place
        assert len(Journal(directory).metrics()) == len(journal.metrics()), place
        assert files.read_json(directory / "history.json") == result.history, place
        if before is not None:
            assert result.history[: len(before["history"])] == before["history"], place

    return check


def test_a_run_goes_on_from_a_crash_at_any_write(
    tmp_path: Path, goes_on: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    with Disk(tmp_path / "whole") as disk:
        whole = execute(tmp_path / "whole")
    assert len(disk.places) >= 400
    named = {place.before for place in disk.places}
    assert {"write .state.pt", "replace .complete.json", "write metrics.jsonl"} <= {
        plain(name) for name in named
    }
    different = {(frozenset(place.content.items()), place.folders): place for place in disk.places}
    assert len(different) >= 100
    for place in different.values():
        goes_on(place, whole, Journal(tmp_path / "whole"))
    assert "damaged" not in capsys.readouterr().out  # an incomplete checkpoint has no marker


def plain(name: str) -> str:
    """Returns the name of a place without the random part of temporary names."""
    return ".".join(part for part in name.split(".") if part != "tmp" and len(part) != 32)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0\0", b'{"step": 2, "by', b"null", b"[]", b'{"step": 2}', b"\xff"]
)
@pytest.mark.parametrize(
    "name", ["checkpoints/*/complete.json", "tracking/run.json", "history.json", "reported.json"]
)
def test_a_file_that_an_earlier_version_left_cut_is_as_one_that_is_missing(
    tmp_path: Path, alone: None, whole_run: tuple[Path, Result], name: str, content: bytes
) -> None:
    source, whole = whole_run
    shutil.copytree(source, tmp_path / "run")
    for place in (tmp_path / "run").glob(name):
        place.write_bytes(content)
    result = execute(tmp_path / "run")
    assert identical(weights(result), weights(whole))
    assert figures(Journal(tmp_path / "run").metrics()) == figures(Journal(source).metrics())
    assert files.read_json(tmp_path / "run/history.json") == result.history


@pytest.fixture
def whole_run(tmp_path: Path, alone: None) -> tuple[Path, Result]:
    """A run that was not interrupted."""
    return tmp_path / "whole", execute(tmp_path / "whole")
