import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.data.shards.manifest import MANIFEST
from pipelines.params import ParamsError, load
from pipelines.training import checkpoints, train
from pipelines.workflow.places import shards_of
from pipelines.workflow.training import adopt_checkpoints, tracked
from tests.support.toy import accident, identical, toy_job, weights


def test_at_a_url_a_stage_whose_machine_was_lost_goes_on_as_the_same_run(tmp_path, monkeypatch):
    params = load()
    params = params.model_copy(
        update={"storage": params.storage.model_copy(update={"root": "memory://outlives"})}
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/nowhere")
    splits = {"train": [{"name": "train-000000.tar", "bytes": 1, "sha256": "00" * 32, "count": 1}]}
    manifest = {
        "classes": ["a", "b"],
        "task": "multiclass",
        "source": "objects",
        "checksum": "ab" * 32,
        "splits": splits,
    }
    shards = Path(shards_of(params.dataset))
    shards.mkdir(parents=True)
    (shards / MANIFEST).write_text(json.dumps(manifest | {"fields": {}}))
    keys = []

    def execute(lost):
        with pytest.raises(KeyError) if lost else nullcontext(), tracked(params, "pretrain") as (run, _):
            keys.append(run.key)
            if lost:
                raise KeyError
        shutil.rmtree(tmp_path / "runs")

    for lost in (True, False, False):
        execute(lost)
    assert keys[0] == keys[1] != keys[2]


class Tags(dict):
    """A tracked run that keeps its tags."""

    def tag(self, key: str, value: str) -> None:
        self[key] = value


def task_with(source: Path | None, name: str = "pretrain") -> Any:
    """Returns a task with `training.resume: source`."""
    training = SimpleNamespace(resume=None if source is None else str(source))
    return SimpleNamespace(name=name, params=SimpleNamespace(training=training))


def test_a_run_whose_code_changed_is_gone_on_with_on_purpose_and_tagged(tmp_path, uninterrupted):
    before, after, run = tmp_path / "pretrain/old", tmp_path / "pretrain/new", Tags()
    with pytest.raises(ConnectionError):
        train(toy_job(before, accident("raise", 9, tmp_path / "marker")))
    adopt_checkpoints(task_with(before), run, str(after))
    assert checkpoints.newest(str(after)) == checkpoints.newest(str(before))
    assert run == {"resumed_from": str(before)}
    result = train(toy_job(after))
    assert identical(weights(result), weights(uninterrupted))
    steps = checkpoints.newest(str(after))
    # The run has checkpoints of its own by now, so those of `before` are not copied again.
    adopt_checkpoints(task_with(before), run, str(after))
    assert checkpoints.newest(str(after)) == steps


def test_the_runs_of_other_stages_are_left_alone_and_an_empty_directory_is_named(tmp_path):
    run, directory = Tags(), str(tmp_path / "bcosify/pretrained/new")
    for task in (task_with(None), task_with(tmp_path / "pretrain/old", "bcosify/pretrained")):
        adopt_checkpoints(task, run, directory)
    assert (run, checkpoints.newest(directory)) == ({}, None)
    with pytest.raises(
        ParamsError, match=r"^training\.resume: there is no whole checkpoint in .*pretrain/old$"
    ):
        adopt_checkpoints(task_with(tmp_path / "pretrain/old"), run, directory)
