"""Shards: deterministic, whole or absent, checked as they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from pipelines.data.shards.manifest import ShardError, read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.writer import write_shards
from pipelines.storage.errors import StorageError
from tests.support.toy_source import SIDE, ToySource, encoded, noise, plain, rich


def write(out, samples, *, shard_size=4, workers=0, task="multiclass"):
    source = ToySource({"train": samples}, task)
    return write_shards(source, Path("raw"), out, shard_size=shard_size, workers=workers, progress=False)


@pytest.fixture
def processes(monkeypatch):
    """Makes processes worth starting for one sample each."""
    monkeypatch.setattr("pipelines.data.shards.writer.WORTH_A_PROCESS", 1)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.processes
def test_same_bytes_written_twice_and_by_processes(tmp_path, processes):
    source = ToySource({"train": [rich(i) for i in range(10)], "test": [rich(i) for i in range(3)]})
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        write_shards(source, tmp_path, tmp_path / name, shard_size=4, workers=workers, progress=False)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    assert set(content(tmp_path / "a")) == {
        "manifest.json",
        "test-000000.tar",
        *(f"{split}.{name}" for split in ("test", "train") for name in ("index.jsonl.gz", "wids.json")),
        *(f"train-00000{i}.tar" for i in range(3)),
    }


def test_bytes_do_not_depend_on_time_or_user(tmp_path, monkeypatch):
    write(tmp_path / "a", [rich(0)])
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    old = os.umask(0o077)
    try:
        write(tmp_path / "b", [rich(0)])
    finally:
        os.umask(old)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_manifest_says_what_the_shards_are(tmp_path):
    written = write(tmp_path, [rich(i) for i in range(6)])
    manifest = read_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == json.loads(json.dumps(written))
    assert json.loads(json.dumps(manifest.to_json())) == json.loads(json.dumps(written))
    assert [shard.count for shard in manifest.splits["train"]] == [4, 2]
    assert manifest.count("train") == 6
    assert manifest.fields["train"] == ("boxes", "mask", "group", "caption")
    # A new key would change the digests of shards that earlier versions wrote.
    assert "tars" not in manifest.to_json()
    for shard in manifest.splits["train"]:
        file = (tmp_path / shard.name).read_bytes()
        assert (len(file), hashlib.sha256(file).hexdigest()) == (shard.bytes, shard.sha256)
    with pytest.raises(ShardError, match="split 'val' is not in the shards"):
        manifest.count("val")


def test_digest_changes_with_any_sample(tmp_path):
    write(tmp_path / "a", [plain(0), plain(1)])
    write(tmp_path / "b", [plain(0), plain(1, label=2)])
    write(tmp_path / "c", [plain(0), plain(1)])
    digests = [read_manifest(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[2] != digests[1]


def test_tar_holds_the_original_bytes_under_webdataset_names(tmp_path):
    sample = rich(0)
    write(tmp_path, [sample])
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert files["k0000.png"] == sample.image
    assert files["k0000.mask.png"] == sample.mask
    assert json.loads(files["k0000.json"]) == {
        "label": 0,
        "boxes": [list(box) for box in sample.boxes],
        "group": 0,
        "caption": "picture 0",
    }


def test_files_have_the_permissions_that_the_user_gives_new_files(tmp_path):
    write(tmp_path, [plain(0)])
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_remote_root_has_the_same_files(tmp_path):
    write(tmp_path, [rich(i) for i in range(5)])
    write("memory://shards/toy", [rich(i) for i in range(5)])
    memory = fsspec.filesystem("memory")
    remote = {Path(path).name: memory.cat_file(path) for path in memory.ls("/shards/toy", detail=False)}
    assert remote == content(tmp_path)
    assert read_manifest("memory://shards/toy") == read_manifest(tmp_path)


def one_box(*box):
    return rich(0, boxes=(box,), mask=None)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (plain(0, label=3), "k0000: label 3 is out of range; there are 3 classes"),
        (plain(0, label=-1), "k0000: label -1 is out of range"),
        (plain(0, label=None), "k0000: no label"),
        (plain(0, key="a.b"), "key 'a.b'"),
        (plain(0, key="a/b"), "key 'a/b'"),
        (plain(0, key=""), "key ''"),
        (plain(0, key="a" * 91), "1 to 90 characters"),
        (plain(0, extension="gif"), "extension 'gif'"),
        (plain(0, group=-2), "group -2"),
        (one_box(0, 0.0, 0.0, SIDE + 1.0, 4.0), r"k0000: box .* is outside its image of 8 x 8"),
        (one_box(0, -1.0, 0.0, 4.0, 4.0), "k0000: box .* is outside its image"),
        (one_box(0, 3.0, 0.0, 3.0, 4.0), "k0000: box .* is empty"),
        (one_box(0, 0.0, 5.0, 3.0, 4.0), "k0000: box .* is empty"),
        (one_box(0, float("nan"), 0.0, 3.0, 4.0), "k0000: box .* is empty"),
        (one_box(3, 0.0, 0.0, 3.0, 4.0), "k0000: box .* has class 3"),
        (rich(0, mask=encoded(noise(0, 4, 8)[..., 0])), "k0000: mask of 8 x 4 pixels; its image has 8 x 8"),
        (rich(0, mask=encoded(noise(0)[..., 0] | 128)), "k0000: mask names instance .*; there are 2 boxes"),
        (rich(0, mask=encoded(noise(0))), "k0000: boxes and mask cannot be checked: mask: mode RGB"),
        (
            rich(0, image=b"nothing", mask=b"nothing"),
            "k0000: boxes and mask cannot be checked: mask: not an image",
        ),
        (one_box(1, 5.0, 0.0, 3.0, 4.0), "k0000: box .* is empty"),
    ],
)
def test_bad_sample_is_refused_by_name_and_leaves_nothing(tmp_path, sample, says):
    with pytest.raises(DataError, match=says) as caught:
        write(tmp_path, [plain(9), sample])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_bad_sample_in_a_process_gives_the_same_error_and_keeps_whole_shards_alone(tmp_path, processes):
    with pytest.raises(DataError, match=r"^k0001: label 3 is out of range; there are 3 classes, 0 to 2$"):
        write(tmp_path, [plain(0), plain(1, label=3)], shard_size=1, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("task", "changes", "says"),
    [
        ("multilabel", {"labels": (0, 3)}, "k0000: label 3 is out of range"),
        ("multilabel", {"labels": (1, 1)}, "name a class twice"),
        ("multilabel", {}, "k0000: no labels"),
        ("caption", {}, "k0000: no caption"),
        ("caption", {"captions": ("a dog", " ")}, "k0000: an empty caption"),
    ],
)
def test_each_task_needs_its_own_label(tmp_path, task, changes, says):
    with pytest.raises(DataError, match=says):
        write(tmp_path, [plain(0, label=None, **changes)], task=task)


def test_key_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"train: key 'k0001' comes twice, in train-000000.tar and train-000001.tar"
    ):
        write(tmp_path, [plain(0), plain(1), replace(plain(2), key="k0001")], shard_size=2)
    assert not (tmp_path / "manifest.json").exists()


def test_image_that_does_not_decode_is_left_to_the_reader_whatever_is_known_of_it(tmp_path):
    write(tmp_path, [plain(0, image=b"nothing"), rich(1, image=b"nothing"), rich(3, image=b"")])
    assert read_manifest(tmp_path).count("train") == 3


def test_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    write(tmp_path, [plain(i) for i in range(4)])
    whole, calls = tarfile.TarFile.addfile, iter(range(100))

    def full_at_the_tenth(self, *arguments):
        if next(calls) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, *arguments)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full_at_the_tenth)
    with pytest.raises(StorageError, match=r"train-000001.tar: no space left on the device") as caught:
        write(tmp_path, [plain(i) for i in range(12)])
    assert "\n" not in str(caught.value)
    # The first shard is complete, and the old manifest is deleted.
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        read_manifest(tmp_path)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/shards/train-000000.tar: not written"):
        write(tmp_path / "file" / "shards", [plain(0)])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"classes": [], "splits": {"train": [{"name": 1}]}}'])
def test_manifest_that_is_none_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=r"manifest\.json: not a manifest of shards"):
        read_manifest(tmp_path)
