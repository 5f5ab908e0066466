"""Where a run lives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.params import DataParams
from pipelines.storage.paths import run_directory


def test_the_same_inputs_find_the_same_run_and_others_never_do() -> None:
    first = run_directory("runs", "pretrain", DataParams(image_size=32), {"a": 1, "b": [2]}, "x")
    assert first == run_directory("runs", "pretrain", DataParams(image_size=32), {"b": [2], "a": 1}, "x")
    others = [
        run_directory("runs", "pretrain", DataParams(image_size=33), {"a": 1, "b": [2]}, "x"),
        run_directory("runs", "pretrain", DataParams(image_size=32), {"a": 1, "b": [2]}, "y"),
        run_directory("runs", "bcosify", DataParams(image_size=32), {"a": 1, "b": [2]}, "x"),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("storage", ["runs", "runs/", Path("runs"), "file://" + os.path.abspath("runs")])
def test_a_folder_is_made_absolute(storage: str | Path) -> None:
    assert run_directory(storage, "pretrain").startswith(f"{os.getcwd()}/runs/pretrain/")


def test_a_url_stays_one() -> None:
    assert run_directory("s3://bucket/runs/", "pretrain").startswith("s3://bucket/runs/pretrain/")
