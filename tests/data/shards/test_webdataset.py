"""Shards are WebDataset's: `webdataset` and `wids` read the same keys, bytes and JSON as our reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.reader import read_samples
from pipelines.data.shards.writer import write_shards
from tests.support.toy_source import ToySource, rich

COUNT = 7
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 3 samples each, with and without boxes, masks, groups and captions."""
    root = tmp_path_factory.mktemp("shards")
    source = ToySource(
        {"train": [rich(number) for number in range(COUNT)], "test": [rich(number) for number in range(2)]}
    )
    write_shards(source, Path("raw"), root, shard_size=3, progress=False)
    return root


def own(root: Path, split: str) -> list[tuple[str, Files]]:
    """Key and files of each sample, by our reader."""
    manifest = read_manifest(str(root))
    numbers = range(manifest.count(split))
    return [
        (sample.key, sample.files)
        for sample in read_samples(str(root), manifest.shards(split), numbers, verify=True)
    ]


def theirs(samples: list[Mapping[str, Any]]) -> list[tuple[str, Files]]:
    """Key and files of each sample, by `webdataset`."""
    return [
        (
            sample["__key__"],
            {suffix: content for suffix, content in sample.items() if not suffix.startswith("__")},
        )
        for sample in samples
    ]


def as_bytes(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a sample of `wids` (suffixes with a dot, contents as streams) to one of `webdataset`."""
    return {
        name.removeprefix("."): content.read() if name[0] == "." else content
        for name, content in sample.items()
    }


def test_webdataset_reads_what_our_reader_reads(root: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = [str(root / shard.name) for shard in read_manifest(str(root)).shards("train")]
    assert theirs(list(webdataset.WebDataset(shards, shardshuffle=False))) == own(root, "train")
    decoded = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["json"] for sample in decoded] == [
        json.loads(files["json"]) for _, files in own(root, "train")
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_index_of_a_split_lists_its_shards_and_their_samples(root: Path, split: str) -> None:
    index = json.loads((root / f"{split}.wids.json").read_text())
    listed = [
        {"url": shard.name, "nsamples": shard.count, "filesize": shard.bytes}
        for shard in read_manifest(str(root)).shards(split)
    ]
    assert index == {"wids_version": 1, "name": split, "shardlist": listed}


@pytest.mark.parametrize("split", ["train", "test"])
def test_wids_reads_what_our_reader_reads_from_the_index(root: Path, split: str, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids")
    dataset = wids.ShardListDataset(
        str(root / f"{split}.wids.json"), transformations=as_bytes, cache_dir=str(tmp_path)
    )
    assert theirs([dataset[number] for number in range(len(dataset))]) == own(root, split)
