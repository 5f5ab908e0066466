import json
from pathlib import Path

import pytest
import torch

from pipelines.evaluation.pictures import Column, draw_front, save_panels
from pipelines.models import ConventionalNetwork, ModelSpec, build, save
from pipelines.storage.files import write_json
from pipelines.storage.publish import pull
from pipelines.workflow.reports import flat, leave_out, write_localisation


def test_nested_figures_are_flattened_with_slashes():
    assert flat({"test": {"accuracy": 1.0, "bcos": {"epg": 0.5}}}) == {
        "test/accuracy": 1.0,
        "test/bcos/epg": 0.5,
    }


def test_an_item_that_the_params_leave_out_has_empty_reports_and_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leave_out("bcosify/scratch", "bcosify.starts")
    assert json.loads(Path("models/bcosify/scratch/left-out.json").read_text()) == {
        "because of": "bcosify.starts"
    }
    assert json.loads(Path("reports/bcosify/scratch/metrics.json").read_text()) == {}
    assert json.loads(Path("reports/bcosify/scratch/history.json").read_text()) == []


def save_model(folder):
    save(
        folder,
        ConventionalNetwork(build("resnet8", num_classes=2)),
        ModelSpec("resnet8", ("a", "b"), 16, "conventional"),
    )


def save_picture(folder):
    column = Column(torch.rand(1, 4, 4), ["bcos"])
    save_panels(folder / "picture.png", torch.rand(1, 6, 4, 4), [column], ["title"])


def pull_file(folder):
    Path("there").mkdir()
    Path("there/shard.tar").write_bytes(b"new")
    pull("there", folder, ["shard.tar"])


WRITERS = {
    "model.safetensors": save_model,
    "model.json": save_model,
    "picture.png": save_picture,
    "front.png": lambda folder: draw_front(folder / "front.png", {0: [1.0]}, [0], ["accuracy"]),
    "localisation.csv": lambda folder: write_localisation(folder / "localisation.csv", {}),
    "metrics.json": lambda folder: write_json(folder / "metrics.json", {}),
    "shard.tar": pull_file,
}


@pytest.mark.parametrize("link", [Path.hardlink_to, Path.symlink_to], ids=["hard", "symbolic"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_is_a_link_into_dvcs_cache_is_replaced_and_the_cache_left_as_it_is(
    tmp_path, monkeypatch, name, link
):
    monkeypatch.chdir(tmp_path)
    cached, out = tmp_path / "cached", tmp_path / "out"
    cached.write_bytes(b"old")
    cached.chmod(0o444)
    out.mkdir()
    link(out / name, cached)
    WRITERS[name](out)
    assert cached.read_bytes() == b"old"
    assert not (out / name).is_symlink()
    assert (out / name).read_bytes() != b"old"
