"""The stage `explain` resumes after a kill, leaves only its explanations, and outputs their index."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.data.shards.manifest import ShardError, read_manifest
from pipelines.data.shards.stored_explanations import StoredExplanations, check_origin
from pipelines.methods import stored_explanations
from pipelines.models import ModelSpec
from pipelines.params import Params, load, replaced
from pipelines.storage import files
from pipelines.workflow import storing
from pipelines.workflow.sharing import explanations_for_all
from pipelines.workflow.storing import store
from pipelines.workflow.tasks import explanations_origin
from tests.support.drawn import CLASSES, drawn_shards

SIDE = 16
OUT = Path("data/explanations")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with shards and a teacher."""
    drawn = drawn_shards(tmp_path / "drawn", 5, image_size=SIDE, counts={"train": 18, "val": 5, "test": 5})
    (tmp_path / "data/shards").mkdir(parents=True)
    Path(drawn).rename(tmp_path / "data/shards/objects")
    spec = ModelSpec("resnet8", CLASSES, SIDE, "bcos", options={"width": 4})
    model = models.assemble(spec).train()
    model(add_inverse(torch.rand(16, 3, SIDE, SIDE)))
    models.save(tmp_path / "models/teacher", model, spec)
    monkeypatch.chdir(tmp_path)
    OUT.mkdir()
    return tmp_path


def params_of(root: str, **more: Any) -> Params:
    values = {"data.image_size": SIDE, "training.workers": 0, "storage.root": root, **more}
    return replaced(load(Path(__file__).parents[2] / "params.yaml"), values)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the names of the shards that were started. The stage is killed in the third one, once."""
    names: list[str] = []
    write_shard = stored_explanations.write_shard

    def killed_once(root: str, name: str, samples: Any) -> Any:
        names.append(name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return write_shard(root, name, samples)

    monkeypatch.setattr(stored_explanations, "write_shard", killed_once)
    return names


ROOTS = ["runs", "memory://storing/{}", "file://{}/storage"]


@pytest.mark.parametrize("root", ROOTS)
def test_a_stage_that_was_killed_goes_on_and_leaves_one_folder(
    folder: Path, written: list[str], root: str
) -> None:
    params = params_of(root.format(folder))
    with pytest.raises(KeyboardInterrupt):
        store(params, OUT)
    assert list(OUT.iterdir()) == []
    store(params, OUT)
    assert written == [f"train-00000{number}.tar" for number in (0, 1, 2, 2, 3)]
    left = files.names_in(f"{params.storage.root}/explanations")
    index = files.read_json(OUT / "explanations.json")
    assert [shard["count"] for shard in index["shards"]] == [5, 5, 5, 3]
    if "://" in root:
        assert [path.name for path in OUT.iterdir()] == ["explanations.json"]
        assert [f"{params.storage.root}/explanations/{name}" for name in left] == [index["root"]]
        assert len(files.names_in(index["root"])) == 2 * 4 + 1
    else:
        assert left == []
        assert len(list(OUT.iterdir())) == 2 * 4 + 1


@pytest.mark.parametrize("root", ROOTS)
def test_students_find_the_explanations_that_the_index_names(folder: Path, root: str) -> None:
    params = params_of(root.format(folder))
    store(params, OUT)
    check_origin(str(OUT), explanations_origin(params))
    found = explanations_for_all(params, str(OUT))
    shard = read_manifest("data/shards/objects").shards("train")[0].name
    with tarfile.open(f"data/shards/objects/{shard}") as tar:
        key = tar.getnames()[0].partition(".")[0]
    logits, maps = StoredExplanations(str(found)).read(shard, key)
    assert (logits.shape, maps.shape) == ((len(CLASSES),), (6, SIDE, SIDE))
    elsewhere = params_of("other")  # another storage changes nothing
    assert explanations_for_all(elsewhere, str(OUT)) == found


def test_complete_explanations_in_a_storage_are_taken_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(f"memory://again/{folder}")
    store(params, OUT)
    index = (OUT / "explanations.json").read_bytes()
    (OUT / "explanations.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(storing, "launch", None)
        store(params, OUT)
    assert (OUT / "explanations.json").read_bytes() == index
    store(replaced(params, {"distill.shots": 1}), OUT)  # other images: another folder
    assert len(files.names_in(f"memory://again/{folder}/explanations")) == 2


def test_explanations_that_are_gone_are_one_line(folder: Path) -> None:
    params = params_of(f"memory://gone/{folder}")
    store(params, OUT)
    files.remove(files.read_json(OUT / "explanations.json")["root"])
    told = (
        r"explanations\.json: its explanations are no longer at memory://[^\n]*: "
        r"run the stage `explain` again$"
    )
    with pytest.raises(ShardError, match=told):
        explanations_for_all(params, str(OUT))


def test_links_in_the_output_are_replaced_and_not_written_through(folder: Path) -> None:
    cached = folder / "cached"
    cached.write_text("DVC's")
    for name in ("explanations.json", "train-000000.tar"):
        (OUT / name).symlink_to(cached)
    store(params_of("runs"), OUT)
    assert cached.read_text() == "DVC's"
    assert not (OUT / "train-000000.tar").is_symlink()
