"""Image-text tars of img2dataset, read in place: each image once, bad ones counted and named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.data.loading.loader import loader
from pipelines.data.shards.index import read_entries, read_index
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.publish import publish_shards, shards_upload
from pipelines.data.shards.sample import DataError
from pipelines.distributed import Context
from pipelines.params import Cc3mParams, DataParams
from tests.support.fetching import fetched, jpeg, left_out, sharded, write_files
from tests.support.image_text_tars import numbered, sample, write_tar
from tests.support.loading import assert_same, keys

DATA = DataParams(image_size=8, on_error="skip", shuffle_buffer=6)
BAD = {
    "samples without a caption": 2,
    "samples without an image": 1,
    "images that do not decode": 1,
    "tars without a sample": 2,
}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Tars with nine and eight good samples, one of them truncated, and with every kind of fault."""
    root = tmp_path / "cc3m"
    half = jpeg(40, 40)[:-300]  # counts as good: its header is intact
    bad = {
        "n2": sample(2, txt=None),
        "n4": sample(4, txt=b" \n"),
        "n5": sample(5, jpg=half),
        "n7": sample(7, jpg=b"<html>"),
    }
    write_tar(root / "00000.tar", numbered(0, 12, **bad))
    write_tar(root / "00001.tar", numbered(1, 9, n0=sample(0, jpg=None)))
    write_tar(root / "00002.tar", {})
    write_files(root, {"00003.tar": b"", "00000.parquet": b"PAR1", "notes.md": "x"})
    return root


def params(root: Any, **changes: Any) -> Cc3mParams:
    return Cc3mParams(**{"source": "cc3m", "root": str(root), "val_count": 3, **changes})


def read(root: str, split: str, rank: int = 0, world_size: int = 1, workers: int = 0, **options: Any) -> Any:
    data = DATA.model_copy(update={"loader_workers": workers})
    return loader(
        root, split, data, options.pop("batch_size", 2), context=Context(rank, world_size), **options
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_once_over_three_ranks_and_the_bad_ones_counted_and_named(
    tars: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = sharded(params(tars), tmp_path)  # two tars with samples, and six processes
    assert left_out(tmp_path) == {**BAD, "files that are neither tars nor their statistics": 1}
    named = "\n".join(caplog.messages)
    for name in (
        "00000.tar: 000000002",
        "00001.tar: 000010000",
        "00000.tar: 000000007",
        "00002.tar",
        "notes.md",
    ):
        assert f"such as {name}" in named
    seen, skipped = [], 0
    for split in ("train", "val"):
        for rank in range(3):
            batches = read(root, split, rank, 3, workers)
            seen += keys(batches)
            skipped += batches.skipped
    good = {f"00000{n:04d}" for n in range(12)} - {"000000002", "000000004", "000000007"} | {
        f"00001{n:04d}" for n in range(1, 9)
    }
    assert sorted(seen) == sorted(good - {"000000005"})
    assert skipped == 1
    if not workers:
        assert "00000.tar: 000000005: does not decode" in caplog.text


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_within_an_epoch_with_other_numbers_of_ranks(
    tars: Path, tmp_path: Path, workers: int
) -> None:
    root = sharded(params(tars), tmp_path)
    whole = [list(read(root, "train", rank, 3, workers, train=True, batch_size=6)) for rank in range(3)]
    everything = keys(itertools.chain(*whole))
    # Of 14 samples, the last two make no full batch, and the truncated one is skipped
    assert len(set(everything)) == len(everything) >= 11
    for rank in range(3):
        assert_same(
            whole[rank][1:], read(root, "train", rank, 3, workers, train=True, batch_size=6, start_batch=1)
        )
    rest = [
        read(root, "train", rank, 2, workers, train=True, batch_size=6, earlier=[(3, 1)]) for rank in range(2)
    ]
    begun = keys(batches[0] for batches in whole)
    after = keys(itertools.chain(*rest))
    assert not set(begun) & set(after)
    assert len(set(after)) == len(after) >= 5


def test_the_tars_stay_as_they_are_and_nothing_is_copied(tars: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    root = sharded(params(tars), tmp_path)
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    assert {path.name for path in Path(root).iterdir()} == {
        "manifest.json",
        "train.index.jsonl.gz",
        "val.index.jsonl.gz",
    }
    manifest = read_manifest(root)
    assert (manifest.task, manifest.classes, manifest.tars) == ("caption", (), str(tars))
    assert {shard.name for shard in manifest.shards("train")} <= {"00000.tar", "00001.tar"}
    assert (manifest.count("train"), manifest.count("val")) == (14, 3)
    for line in read_index(root, manifest, "train"):
        assert line["caption"] == f"photo {100 * int(line['key'][:5]) + int(line['key'][5:])}"
    for batch in read(root, "val", fields=("caption", "captions")):
        assert batch["captions"] == [[caption] for caption in batch["caption"]]


def test_a_tar_of_two_splits_gives_each_its_own_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "cc3m/00000.tar", numbered(0, 8))
    root = sharded(params(tmp_path / "cc3m", val_count=4), tmp_path)
    manifest = read_manifest(root)
    assert manifest.shards("train") == manifest.shards("val")  # one tar, with four samples of each split
    found = {split: keys(read(root, split)) for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == [f"00000{n:04d}" for n in range(8)]


def test_held_out_images_come_from_few_tars(tmp_path: Path) -> None:
    for tar in range(4):
        write_tar(tmp_path / f"cc3m/{tar:05d}.tar", numbered(tar, 5))
    root = sharded(params(tmp_path / "cc3m", val_count=5), tmp_path)
    assert [shard.count for shard in read_manifest(root).shards("val")] == [5]
    assert len(read_manifest(root).shards("train")) == 3


def test_splits_may_be_given_tars(tmp_path: Path) -> None:
    for name, tar in (("train/00000", 0), ("train/00001", 1), ("val/00000", 2)):
        write_tar(tmp_path / f"cc3m/{name}.tar", numbered(tar, 3))
    some = params(tmp_path / "cc3m", val_count=None, splits={"val": "val/*.tar", "test": "train/00001.tar"})
    manifest = read_manifest(sharded(some, tmp_path))
    assert {split: [shard.name for shard in shards] for split, shards in manifest.splits.items()} == {
        "train": ["train/00000.tar"],
        "val": ["val/00000.tar"],
        "test": ["train/00001.tar"],
    }


def test_names_that_come_in_two_tars_get_keys_of_their_own(tmp_path: Path) -> None:
    for tar in range(2):
        write_tar(tmp_path / f"cc3m/{tar:05d}.tar", {"a": sample(tar), f"own{tar}": sample(9)})
    root = sharded(params(tmp_path / "cc3m", val_count=1), tmp_path)
    found = keys(read(root, "train")) + keys(read(root, "val"))
    assert len(set(found)) == 4
    assert {"own0", "own1"} <= set(found)


def test_tars_at_a_url_are_read_from_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "cc3m/00000.tar", numbered(0, 7))
    local = sharded(params(tmp_path / "cc3m"), tmp_path)
    batches = list(read(local, "train", train=True))
    url = f"memory://cc3m/{tmp_path.name}"
    fsspec.filesystem("memory").put(str(tmp_path / "cc3m"), url, recursive=True)
    root = sharded(params(url), tmp_path)
    assert read_manifest(root).tars == url
    assert_same(batches, read(root, "train", train=True))
    published = publish_shards(root, f"memory://published/{tmp_path.name}")
    assert shards_upload(root, "x").names == ("train.index.jsonl.gz", "val.index.jsonl.gz", "manifest.json")
    assert_same(batches, read(published, "train", train=True))
    shard = read_manifest(root).shards("train")[0]
    assert len(read_entries(published, shard)) == shard.count == 4


@pytest.mark.parametrize("harm", ["change", "remove", "cut"])
def test_a_tar_that_changed_after_fetch_is_one_line(tars: Path, tmp_path: Path, harm: str) -> None:
    root = sharded(params(tars), tmp_path)
    path = tars / "00001.tar"
    content = path.read_bytes()
    path.unlink()
    if harm != "remove":
        path.write_bytes(content[:600] + b"x" + content[601:] if harm == "change" else content[:-1024])
    data = DATA.model_copy(update={"verify": True})
    with pytest.raises(DataError, match=r"^00001\.tar: (sha256 is|missing;|truncated: )[^\n]*$"):
        list(itertools.chain(*(loader(root, split, data, 4) for split in ("train", "val"))))


def test_a_tar_that_is_cut_short_is_one_line(tars: Path, tmp_path: Path) -> None:
    path = tars / "00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"^00001\.tar: not a whole tar [^\n]*get it again$"):
        fetched(params(tars), tmp_path)


def test_images_that_the_statistics_count_and_the_tar_lacks_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "cc3m/00000.tar", numbered(0, 6))
    write_files(tmp_path, {"cc3m/00000_stats.json": '{"successes": 8}'})
    fetched(params(tmp_path / "cc3m"), tmp_path)
    assert left_out(tmp_path) == {"images that are not in their tars although the statistics count them": 2}


def test_tars_that_were_read_before_an_interruption_are_not_read_again(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.data.sources import cc3m

    real, read_names = cc3m.read_pairs, []

    def some(path: Path, name: str) -> Any:
        if name == "00001.tar" and name not in read_names:
            read_names.append(name)
            raise KeyboardInterrupt
        read_names.append(name)
        return real(path, name)

    monkeypatch.setattr(cc3m, "read_pairs", some)
    with pytest.raises(KeyboardInterrupt):
        fetched(params(tars), tmp_path)
    fetched(params(tars), tmp_path)
    assert read_names == ["00000.tar", "00001.tar", "00001.tar", "00002.tar", "00003.tar"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"val_count": None}, "no validation images: set val_count"),
        ({"val_count": 17}, "val_count: 17 images cannot be held out of 17"),
        ({"splits": {"val": "x*"}}, "no tar fits 'x.', the pattern of val"),
        ({"splits": {"val": "*.tar", "test": "00001*"}}, "is in the splits val and test"),
    ],
)
def test_splits_that_cannot_be_made_are_one_line(
    tars: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=rf"^[^\n]*{told}[^\n]*$"):
        fetched(params(tars, **changes), tmp_path)


def test_a_folder_without_tars_and_no_folder_are_one_line(tmp_path: Path) -> None:
    write_files(tmp_path, {"other/a.txt": "x"})
    with pytest.raises(DataError, match=r"has no tar; there is: a\.txt$"):
        fetched(params(tmp_path / "other"), tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        fetched(params(tmp_path / "nowhere"), tmp_path)


def test_an_address_with_a_password_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^https://host/cc3m: contains a secret") as raised:
        fetched(params("https://me:hush@host/cc3m"), tmp_path)
    assert "hush" not in str(raised.value)
