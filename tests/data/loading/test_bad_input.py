"""The loader on bad shards and images: an error in one line, from any process."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import ShardError
from tests.support.loading import DATA, assert_same, evaluate, keys, train, write
from tests.support.toy_source import SIDE, encoded, noise, plain


@pytest.fixture
def shards(tmp_path):
    return Path(write(tmp_path, [plain(i) for i in range(12)]))


def assert_refused(says, *, kind=ShardError, root, **options):
    """Checks that the error has one line, in this process and from loader processes."""
    for workers in (0, 2):
        with pytest.raises(kind, match=says) as caught:
            list(evaluate(root, workers=workers, **options))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_truncated_shard(shards, keep):
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(rf"train-000001.tar: truncated: {keep} bytes; the manifest says \d+", root=shards)


@pytest.mark.parametrize("keep", [0, 100, 1000, 3000])
def test_truncated_shard_of_the_right_size_in_the_manifest(shards, keep):
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    edit_shard(shards, 1, bytes=keep)
    assert_refused(r"train-000001.tar: ", root=shards)


def edit_shard(root: Path, number: int, **changes):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["train"][number].update(changes)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_missing_shard(shards):
    (shards / "train-000002.tar").unlink()
    assert_refused("train-000002.tar: missing", root=shards)


def test_count_that_is_not_the_manifests(shards):
    edit_shard(shards, 0, count=4)
    assert_refused("train-000000.tar: 5 samples; the manifest says 4", root=shards)


def test_sha256_is_checked_when_asked(shards):
    path = shards / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the padding at the end, which only the sha256 covers
    path.write_bytes(content)
    assert len(keys(evaluate(shards))) == 12
    assert_refused("train-000001.tar: sha256 is [0-9a-f]{64}; the manifest says", root=shards, verify=True)


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.tar"])
def test_missing_on_a_remote_root(name):
    write("memory://loader/missing", [plain(0)])
    import fsspec

    fsspec.filesystem("memory").rm(f"/loader/missing/{name}")
    with pytest.raises(ShardError, match=f"no {name}" if name.endswith("json") else f"{name}: missing"):
        list(evaluate("memory://loader/missing"))


def replace_shard(root: Path, files: dict[str, bytes], count: int = 1):
    """Replaces the first shard by a tar of these files."""
    with tarfile.open(root / "train-000000.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    edit_shard(root, 0, bytes=(root / "train-000000.tar").stat().st_size, count=count)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.png": b""}, "train-000000.tar: a has png; one image and a json are needed"),
        ({"a.json": b"{}"}, "train-000000.tar: a has json"),
        ({"a.json": b"{}", "a.png": b"", "a.jpg": b""}, "train-000000.tar: a has json, png, jpg"),
        ({"a.png": b"", "a.json": b"{"}, "train-000000.tar: a: its json is not that of task multiclass"),
        ({"a.png": b"", "a.json": b"[1]"}, "train-000000.tar: a: its json is not that of task multiclass"),
        ({"a.png": b"", "a.json": b"{}"}, "train-000000.tar: a: its json is not that of task multiclass"),
        (
            {"a.png": b"", "a.json": b'{"label": 3}'},
            "train-000000.tar: a: label 3 is out of range; there are 3 classes",
        ),
        ({"a.png": b"", "a.json": b'{"label": "x"}'}, "train-000000.tar: a: its json is not that"),
    ],
)
def test_sample_that_is_none(shards, files, says):
    replace_shard(shards, files)
    with pytest.raises(ShardError, match=says):
        list(evaluate(shards, on_error="skip"))


def test_foreign_files_in_a_shard_are_never_decoded(shards):
    pickle = b"cos\nsystem\n(S'exit 1'\ntR."
    image = plain(0).image
    replace_shard(shards, {"a.pyd": pickle, "a.png": image, "a.json": b'{"label": 1}', "b.pkl": pickle})
    batch = next(iter(evaluate(shards, batch_size=1)))
    assert (batch["key"], batch["label"].tolist()) == (["a"], [1])


def test_another_shard_under_a_name_that_was_read_is_scanned_anew(shards):
    assert keys(evaluate(shards))[0] == "k0000"
    replace_shard(shards, {"new.json": b'{"label": 1}', "new.png": plain(0).image})
    assert keys(evaluate(shards))[0] == "new"


BROKEN = (3, 6, 7)


@pytest.fixture
def broken(tmp_path):
    """Twelve samples; three images do not decode."""
    samples = [plain(i, image=encoded(noise(i))[:60]) if i in BROKEN else plain(i) for i in range(12)]
    return write(tmp_path, samples)


def test_image_that_does_not_decode_is_named(broken):
    assert_refused(r"train-000000.tar: k0003: does not decode: ", kind=DecodeError, root=broken)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_skipped_images_are_left_out_and_counted(broken, workers, training):
    whole = partial(train if training else evaluate, broken, batch_size=4, workers=workers, on_error="skip")
    batches = whole()
    got = list(batches)
    assert batches.skipped == 3 == sum(batch["skipped"] for batch in got)
    assert sorted(keys(got)) == [f"k{i:04d}" for i in range(12) if i not in BROKEN]
    assert all(len(batch["key"]) == len(batch["image"]) == 4 - batch["skipped"] for batch in got)
    assert_same(got[1:], whole(start_batch=1))
    list(batches)
    assert batches.skipped == 3  # in this pass alone


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_of_which_nothing_decodes(broken, workers):
    batches = evaluate(broken, batch_size=1, on_error="skip", workers=workers)
    assert len(list(batches)) == 9  # evaluation drops a batch without images
    assert batches.skipped == 3
    with pytest.raises(DecodeError, match=r"train-00000\d.tar: k000\d: does not decode"):
        # Training on one rank does not.
        list(train(broken, batch_size=1, on_error="skip", workers=workers))


@pytest.mark.parametrize(
    "image",
    [
        encoded(noise(0)[..., 0]),
        encoded(np.concatenate([noise(0), noise(1)[..., :1]], axis=2)),
        encoded(noise(0)[..., 0].astype(np.uint16) * 257),
    ],
    ids=["1 channel", "4 channels", "16 bits"],
)
def test_images_of_other_channels_and_depths_are_converted(tmp_path, image):
    [batch] = evaluate(write(tmp_path, [plain(0, image=image), plain(1)]))
    assert batch["image"].shape == (2, 3, SIDE, SIDE)
    assert batch["image"][0].std() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"start_batch": -1},
        {"fields": "box"},
    ],
)
def test_arguments_out_of_range(shards, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evaluate(shards, **options)


def test_unknown_split_is_named(shards):
    with pytest.raises(ShardError, match=r"split 'val' is not in the shards \(they have train\)"):
        loader(shards, "val", DATA, 1)
