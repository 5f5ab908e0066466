"""Image folders as found in practice: each entry is used, or counted and named, whatever its name."""

import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.params import DataParams
from tests.support.fetching import (
    encoded,
    fetched,
    image_folder,
    left_out,
    photo_folder,
    samples,
    sharded,
    write_files,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return photo_folder(tmp_path / "photos")


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.gif", "x.ppm"])
def test_an_image_that_does_not_decode_is_left_to_the_loader_in_any_format(folder, tmp_path, name):
    kind = {"png": "png", "bmp": "bmp", "tif": "tiff", "gif": "gif", "ppm": "ppm"}[name[2:]]
    content = encoded(7, kind)
    (folder / "test/ant" / name).write_bytes(content[: len(content) // 2])
    root = sharded(image_folder(folder), tmp_path)
    with pytest.raises(DecodeError, match=r"test-000000\.tar: ant_x: does not decode: "):
        list(loader(root, "test", DataParams(image_size=6), 7))
    batches = loader(root, "test", DataParams(image_size=6, on_error="skip"), 7)
    assert [len(batch["key"]) for batch in batches] == [6]
    assert batches.skipped == 1


def test_what_is_left_out_is_counted_and_named(folder, tmp_path, caplog):
    before = samples(image_folder(folder), tmp_path)
    assert left_out(tmp_path) == {}
    caplog.clear()
    write_files(
        folder,
        {
            "train/ant/.DS_Store": "x",
            "train/.cache/y.png": "x",
            "train/.cache/z.png": "x",
            "train/ant/notes.txt": "x",
            "train/ant/thumbs.db": "x",
            "train/classes.csv": "x",
            "valid/ant/1.png": "x",
            "valid/ant/2.png": "x",
            "README": "x",
        },
    )
    (folder / "train/ant/gone.png").symlink_to("nowhere.png")
    (folder / "train/ant/directory.png").mkdir()
    os.mkfifo(folder / "train/ant/pipe.png")
    assert samples(image_folder(folder), tmp_path) == before
    counts = {
        "hidden files and by-products of operating systems": (2, "train/.cache"),
        "files that are not images by their names": (3, "train/ant/notes.txt"),
        "files outside of train/, val/, test/": (3, "README"),
        "links to nothing": (1, "train/ant/gone.png"),
        "entries that are neither files nor folders": (1, "train/ant/pipe.png"),
    }
    assert left_out(tmp_path) == {reason: count for reason, (count, _) in counts.items()}
    told = [
        f"imagefolder: {folder}: left out: {count} {reason}, such as {name}"
        for reason, (count, name) in counts.items()
    ]
    assert sorted(caplog.messages) == sorted(told)


def test_unlabelled_images_are_counted_alike(folder, tmp_path):
    write_files(folder, {"train/notes.txt": "x", "valid/1.png": "x"})
    (folder / "train/gone.png").symlink_to("nowhere.png")
    fetched(image_folder(folder, labelled=False), tmp_path)
    assert left_out(tmp_path) == {
        "files that are not images by their names": 1,
        "files outside of train/, val/, test/": 1,
        "links to nothing": 1,
    }


@pytest.mark.parametrize("name", ["train/owl", "val", "test/ant"])
def test_a_link_to_nothing_where_a_class_or_split_would_be_ends_the_fetch(folder, tmp_path, name):
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(DataError, match=rf"{name}: links to nothing: mend or remove it"):
        fetched(image_folder(folder), tmp_path)


def test_an_image_that_may_not_be_read_ends_the_fetch(folder, tmp_path, monkeypatch):
    (folder / "train/ant/notes.txt").write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: "train/ant/" not in str(path))
    with pytest.raises(DataError, match=r"train/ant/00\.png may not be read: give the right to read it"):
        fetched(image_folder(folder), tmp_path)


def test_a_class_has_one_name_whatever_system_packed_its_splits(folder, tmp_path):
    for split in ("train", "test"):
        name = unicodedata.normalize("NFD" if split == "train" else "NFC", "Kühe")
        (folder / split / "cat").rename(folder / split / name)
    shutil.copytree(folder / "train/bee", folder / "train" / unicodedata.normalize("NFC", "Kühe"))
    source, raw = fetched(image_folder(folder), tmp_path)
    assert source.describe(raw).classes == ("Kühe", "ant", "bee")
    assert source.describe(raw).counts == {"train": 26, "val": 6, "test": 6}


def test_classes_that_differ_in_case_stay_two_and_are_told(folder, tmp_path, caplog):
    for split in ("train", "test"):
        shutil.copytree(folder / split / "ant", folder / split / "Ant")
    root = sharded(image_folder(folder), tmp_path)
    assert read_manifest(root).classes == ("Ant", "ant", "bee", "cat")
    assert "classes Ant and ant differ in upper and lower case alone: they are two classes" in caplog.text


def test_classes_and_files_whose_names_are_not_text_are_taken(folder, tmp_path):
    for split in ("train", "test"):
        odd = Path(os.fsdecode(os.fsencode(folder / split) + b"/caf\xe9"))
        (folder / split / "cat").rename(odd)
        (odd / "00.png").rename(Path(os.fsdecode(os.fsencode(odd) + b"/\xff\n.png")))
    root = sharded(image_folder(folder), tmp_path)
    assert read_manifest(root).classes == ("ant", "bee", "caf\\xe9")
    assert sum(len(batch["key"]) for batch in loader(root, "test", DataParams(image_size=6), 7)) == 6


def test_names_too_long_for_keys_go_into_shards(folder, tmp_path):
    long = "asset_2026-11-27_backyard_feeder_IMG_0042_JPG.rf.0123456789abcdef0123456789abcdef" * 2
    for number in range(2):
        (folder / "test/ant" / f"{long}{number}.png").write_bytes(encoded(number))
    root = sharded(image_folder(folder), tmp_path)
    assert read_manifest(root).count("test") == 8


def test_classes_of_one_image_and_two_are_taken(folder, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        write_files(folder, {f"train/{name}/{number}.png": encoded(number) for number in range(count)})
    read = samples(image_folder(folder, val_count=12), tmp_path)
    counts = Counter(sample.label for sample in read["train"])
    assert counts.keys() == set(range(5))
    assert len(read["val"]) == 12
