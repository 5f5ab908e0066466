"""Images with captions in tables, and Flickr8k: each image has all its captions; bad rows are counted."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.loading.loader import loader
from pipelines.data.shards.index import read_index
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError, Sample
from pipelines.data.sources import get
from pipelines.params import CaptionsParams, DataParams
from tests.support.fetching import SHARED, encoded, fetched, left_out, samples, sharded, write_files

BIG = 'two dogs, one "big"'
ROWS = [
    ("a.png", "a dog"),
    ("./a.png", BIG),
    ("sub/b.png", "a cat"),
    ("c.png", "a bird"),
    ("d.png", "ein Käfer"),
]


def quoted(cells: tuple[str, ...], separator: str) -> str:
    return separator.join('"' + cell.replace('"', '""') + '"' for cell in cells)


def table(rows: list[Any], separator: str = ",", head: str = "image,caption") -> str:
    return "\n".join([head.replace(",", separator), *(quoted(row, separator) for row in rows)]) + "\n"


def folder(tmp_path: Path, files: dict[str, bytes | str], images: str = "") -> Path:
    """Four images below `images`, and other files."""
    names = ("a.png", "sub/b.png", "c.png", "d.png")
    return write_files(
        tmp_path / "pairs", {**{images + name: encoded(seed) for seed, name in enumerate(names)}, **files}
    )


def captions(root: Any, **changes: Any) -> CaptionsParams:
    return CaptionsParams(**{"source": "captions", "root": str(root), "val_count": 1, **changes})


def texts(read: dict[str, list[Sample]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Key -> captions, by split."""
    return {split: {sample.key: sample.captions for sample in listed} for split, listed in read.items()}


def merged(read: dict[str, list[Sample]]) -> dict[str, tuple[str, ...]]:
    return {key: found for of_split in texts(read).values() for key, found in of_split.items()}


ALL = {"a": ("a dog", 'two dogs, one "big"'), "sub_b": ("a cat",), "c": ("a bird",), "d": ("ein Käfer",)}


@pytest.mark.parametrize("images", ["", "Images/", "images/"])
@pytest.mark.parametrize(
    ("name", "separator"), [("captions.csv", ","), ("pairs.tsv", "\t"), ("captions.txt", ",")]
)
def test_a_table_beside_the_images(tmp_path: Path, images: str, name: str, separator: str) -> None:
    root = folder(tmp_path, {name: table(ROWS, separator)}, images)
    read = samples(captions(root), tmp_path)
    assert merged(read) == ALL
    assert {split: len(listed) for split, listed in read.items()} == {"train": 3, "val": 1, "test": 0}
    assert {sample.key: sample.image for listed in read.values() for sample in listed}["sub_b"] == encoded(1)
    assert left_out(tmp_path) == {}


def test_an_archive_gives_the_samples_of_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path, {"captions.csv": table(ROWS)})
    with tarfile.open(tmp_path / "pairs.tar.gz", "w:gz") as archive:
        archive.add(root, "top/pairs")
    assert samples(captions(tmp_path / "pairs.tar.gz"), tmp_path) == samples(captions(root), tmp_path)


def test_the_checksum_changes_with_a_caption(tmp_path: Path) -> None:
    root = folder(tmp_path, {"captions.csv": table(ROWS)})
    source, raw = fetched(captions(root), tmp_path)
    before = source.describe(raw).checksum
    write_files(root, {"captions.csv": table(ROWS).replace("a cat", "a rat")})  # same size
    source, raw = fetched(captions(root), tmp_path)
    assert source.describe(raw).checksum != before


def test_columns_and_a_column_of_splits(tmp_path: Path) -> None:
    rows = [
        (text, split, name)
        for (name, text), split in zip(ROWS, ("train", "train", "val", "dev", "test"), strict=True)
    ]
    root = folder(tmp_path, {"metadata.csv": "\ufeff" + table(rows, head="title,part,filepath")})
    some = captions(
        root, image_column="filepath", caption_column="title", split_column="part", val_count=None
    )
    assert texts(samples(some, tmp_path)) == {
        "train": {"a": ALL["a"]},
        "val": {"sub_b": ALL["sub_b"], "c": ALL["c"]},
        "test": {"d": ALL["d"]},
    }


@pytest.mark.parametrize(
    "given", [{}, {"tables": {"train": "train.csv", "val": "validation.csv", "test": "test.csv"}}]
)
def test_a_file_a_split(tmp_path: Path, given: dict[str, Any]) -> None:
    tables = {"train.csv": table(ROWS[:2]), "validation.csv": table(ROWS[2:3]), "test.csv": table(ROWS[3:])}
    read = samples(captions(folder(tmp_path, tables), val_count=None, **given), tmp_path)
    assert {split: list(found) for split, found in texts(read).items()} == {
        "train": ["a"],
        "val": ["sub_b"],
        "test": ["c", "d"],
    }


def test_shards_have_all_captions_of_an_image(tmp_path: Path) -> None:
    root = sharded(captions(folder(tmp_path, {"captions.csv": table(ROWS)})), tmp_path)
    manifest = read_manifest(root)
    assert (manifest.task, manifest.classes, manifest.fields["train"]) == ("caption", (), ("caption",))
    found = {}
    for split in ("train", "val"):
        for batch in loader(root, split, DataParams(image_size=4), 2, fields=("captions",)):
            found |= dict(zip(batch["key"], map(tuple, batch["captions"]), strict=True))
    assert found == ALL
    assert (
        sum("captions" in line for split in ("train", "val") for line in read_index(root, manifest, split))
        == 1
    )


# Bad rows ---------------------------------------------------------------------------------------------------

BAD = {
    "names no image": ("", "a dog", "rows without the name of an image"),
    "c.png has no caption": ("c.png", "  ", "rows without a caption"),
    "there is no image e.png": ("e.png", "a dog", "rows whose image is missing"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_row_without_image_or_text_is_named_or_left_out(tmp_path: Path, fault: str) -> None:
    image, text, plural = BAD[fault]
    root = folder(tmp_path, {"captions.csv": table([*ROWS[:3], (image, text), *ROWS[3:]])})
    with pytest.raises(
        DataError,
        match=rf"^captions: {root}: captions\.csv: line 5: {fault}; on_bad_row: skip leaves such rows out$",
    ):
        fetched(captions(root), tmp_path)
    assert merged(samples(captions(root, on_bad_row="skip"), tmp_path)) == ALL
    assert left_out(tmp_path) == {plural: 1}


def test_images_without_captions_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, {"captions.csv": table(ROWS[:-1])})
    fetched(captions(root), tmp_path)
    assert left_out(tmp_path) == {"images without a caption in a split": 1}


@pytest.mark.parametrize(
    ("files", "changes", "told"),
    [
        (
            {"captions.csv": table(ROWS, head="image,text")},
            {},
            r"captions\.csv: has no column caption \(it has image, text\)",
        ),
        (
            {"captions.csv": "image,caption\na.png,a dog, a cat\n"},
            {},
            r"line 2: has more cells than the header: put texts",
        ),
        (
            {"captions.csv": 'image,caption\na.png,"a dog\n'},
            {},
            r"line 2: not a row .unexpected end of data.: quotes",
        ),
        ({"captions.csv": ""}, {}, r"has no column image, caption \(it has none\)"),
        ({"captions.csv": "image,caption\n"}, {}, r"train has no image with a caption"),
        (
            {"captions.csv": table([(*row, "trian") for row in ROWS], head="image,caption,split")},
            {},
            r"line 2: split is 'trian'",
        ),
        (
            {
                "captions.csv": table(
                    [(*row, split) for row, split in zip(ROWS, ("train", "val", *"   "), strict=True)],
                    head="image,caption,split",
                )
            },
            {},
            r"line 3: a\.png is in train and in val",
        ),
        ({"captions.csv": table(ROWS)}, {"val_count": None}, r"has no validation images: set val_count"),
        ({"captions.csv": table(ROWS)}, {"table": "x.csv"}, r"x\.csv is missing; there is: "),
        (
            {"one.csv": table(ROWS), "two.csv": table(ROWS)},
            {},
            r"which file has the captions\? Set table; there is: one\.csv, two\.csv",
        ),
        ({}, {}, r"which file has the captions\? Set table; there is: a\.png"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(
    tmp_path: Path, files: dict[str, bytes | str], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=rf"^[^\n]*{told}[^\n]*$"):
        fetched(captions(folder(tmp_path, files), **changes), tmp_path)


# Flickr8k ---------------------------------------------------------------------------------------------------

LISTS = {
    "Flickr_8k.trainImages.txt": "a.png\n",
    "Flickr_8k.devImages.txt": "c.png\n",
    "Flickr_8k.testImages.txt": "d.png",
}


@pytest.mark.parametrize("images", ["Images/", "Flicker8k_Dataset/"])
@pytest.mark.parametrize("tokens", [True, False])
def test_flickr8k_in_its_own_layout(tmp_path: Path, images: str, tokens: bool) -> None:
    rows = [(name.rpartition("/")[2], text) for name, text in ROWS]
    own = "".join(f"{name}#{number}\t{text}\n" for number, (name, text) in enumerate(rows))
    named = {"Flickr8k.token.txt": own} if tokens else {"captions.txt": table(rows)}
    read = samples(captions(folder(tmp_path, {**named, **LISTS}, images), val_count=None), tmp_path)
    assert texts(read) == {"train": {"a": ALL["a"]}, "val": {"c": ALL["c"]}, "test": {"d": ALL["d"]}}
    assert left_out(tmp_path) == {
        "captions of images that no split lists": 1,
        "images without a caption in a split": 1,
    }


def test_an_image_of_a_list_needs_a_caption(tmp_path: Path) -> None:
    root = folder(tmp_path, {"captions.txt": table(ROWS[:-1]), **LISTS}, "Images/")
    with pytest.raises(
        DataError, match=rf"^captions: {root}: d\.png: has no caption; on_bad_row: skip leaves such rows out$"
    ):
        fetched(captions(root), tmp_path)
    fetched(captions(root, on_bad_row="skip"), tmp_path)
    assert left_out(tmp_path)["images without a caption"] == 1


@pytest.mark.skipif(
    not (SHARED / "data/flickr8k.tar.gz").exists(), reason="needs shared/data/flickr8k.tar.gz"
)
def test_flickr8k_itself(tmp_path: Path) -> None:
    some = captions(SHARED / "data/flickr8k.tar.gz", val_count=None)
    source, raw = fetched(some, tmp_path)
    assert source.describe(raw).counts == {"train": 5997, "val": 1000, "test": 1000}
    for split, count in source.describe(raw).counts.items():
        assert Counter(len(ref.captions) for ref in source.index(raw, split)) == {5: count}
    first = source.load(raw, source.index(raw, "test")[0])
    assert first.captions[0] == "A blond woman in a blue shirt appears to wait for a ride ."
    assert get(some).describe(raw).task == "caption"
