"""The index has labels and place of each sample, and subsets are drawn from it alone."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.data.loading.subsets import annotated_images, few_shot, validation_images
from pipelines.data.shards.index import index_name, read_entries, read_index
from pipelines.data.shards.manifest import ShardError, read_manifest
from pipelines.data.shards.publish import publish_shards
from pipelines.data.shards.reader import SUFFIXES, read_samples
from pipelines.data.shards.sample import DataError, captions_of
from pipelines.data.shards.tar import scan
from pipelines.data.shards.writer import write_shards
from tests.support.loading import evaluate
from tests.support.toy_source import ToySource, plain, rich

COUNT = 12


def write(root: Any, samples: list[Any], task: str = "multiclass", split: str = "train") -> str:
    write_shards(ToySource({split: samples}, task), Path("raw"), root, shard_size=5, progress=False)
    return str(root)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return Path(write(tmp_path / "shards", [rich(number) for number in range(COUNT)]))


def drawn(root: str) -> list[Any]:
    """All subsets that are drawn without reading an image."""
    return [
        few_shot(root, "train", 2, 0),
        annotated_images(root, "train", 0.5, 0),
        validation_images(root, "train"),
    ]


def test_subsets_and_lists_of_images_are_drawn_without_a_shard(shards: Path) -> None:
    before = drawn(str(shards))
    for path in shards.glob("*.tar"):
        path.unlink()
    assert drawn(str(shards)) == before
    assert before[1] == tuple(sorted(before[1]))
    assert set(before[1]) <= {rich(number).key for number in range(COUNT) if rich(number).boxes}
    assert before[2] == {
        "split": "train",
        "count": COUNT,
        "keys": [f"k{number:04d}" for number in range(COUNT)],
    }


def test_subsets_at_a_url_ask_for_manifest_and_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    root = write("memory://index/remote", [rich(number) for number in range(COUNT)])
    memory, asked = type(fsspec.filesystem("memory")), []
    for name in ("cat_file", "get_file", "open"):
        call = getattr(memory, name)
        monkeypatch.setattr(
            memory,
            name,
            lambda self, path, *rest, _call=call, **more: (
                asked.append(path),
                _call(self, path, *rest, **more),
            )[1],
        )
    drawn(root)
    assert {path.rpartition("/")[2] for path in asked} == {"manifest.json", index_name("train")}


def test_the_manifest_names_the_index_and_each_sample_has_a_line(shards: Path) -> None:
    index = read_manifest(str(shards)).indexes["train"]
    content = (shards / index.name).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (index.bytes, index.sha256)
    lines = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    assert [line["shard"]["name"] for line in lines if "shard" in line] == [
        f"train-00000{number}.tar" for number in range(3)
    ]
    samples = [line for line in lines if "shard" not in line]
    for number, line in enumerate(samples):
        sample = rich(number)
        assert {name: value for name, value in line.items() if name != "files"} == {
            "key": sample.key,
            "label": sample.label,
            **(
                {"group": sample.group, "caption": sample.captions[0], "box_classes": [0, 2]}
                if sample.boxes
                else {}
            ),
        }
        shard = (shards / f"train-00000{number // 5}.tar").read_bytes()
        offset, size = line["files"]["png"]
        assert shard[offset : offset + size] == sample.image
        assert ("mask.png" in line["files"]) == (sample.mask is not None)


def test_several_labels_are_in_the_index_and_so_are_none(tmp_path: Path) -> None:
    samples = [
        replace(plain(number), label=None, labels=labels) for number, labels in enumerate([(0, 2), (), (1,)])
    ]
    root = write(tmp_path, samples, task="multilabel")
    assert [line["labels"] for line in read_index(root, read_manifest(root), "train")] == [[0, 2], [], [1]]


def test_one_caption_is_a_text_and_several_are_a_list(tmp_path: Path) -> None:
    captions = [(), ("one",), ("one", "two")]
    samples = [plain(number, captions=texts) for number, texts in enumerate(captions)]
    root = write(tmp_path, samples)
    lines = list(read_index(root, read_manifest(root), "train"))
    assert [(line.get("caption"), line.get("captions")) for line in lines] == [
        (None, None),
        ("one", None),
        (None, ["one", "two"]),
    ]
    stored = [
        json.loads(sample.files["json"])
        for sample in read_samples(root, read_manifest(root).shards("train"), range(3), verify=True)
    ]
    assert [captions_of(line) for line in lines] == [captions_of(line) for line in stored] == captions
    assert read_manifest(root).fields["train"] == ("caption",)


def test_the_places_in_the_index_are_those_in_the_tars(shards: Path) -> None:
    root = str(shards)
    remote = write("memory://index/places", [rich(number) for number in range(COUNT)])
    for shard in read_manifest(root).shards("train"):
        path = shards / shard.name
        found = scan(path, shard.bytes, path.stat().st_mtime_ns, SUFFIXES)
        assert read_entries(root, shard) == read_entries(remote, shard) == found
        assert len(found) == shard.count


def test_published_shards_have_their_index(shards: Path) -> None:
    assert drawn(publish_shards(str(shards), "memory://index/published")) == drawn(str(shards))


def without_index(shards: Path) -> str:
    """Turns the shards into those of an earlier version, without index."""
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["indexes"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    return str(shards)


@pytest.mark.parametrize(
    "draw", [lambda root: few_shot(root, "train", 1, 0), lambda root: validation_images(root, "train")]
)
def test_shards_of_an_earlier_version_are_read_and_only_what_needs_an_index_is_refused(
    shards: Path, draw: Any
) -> None:
    root = without_index(shards)
    assert sum(len(batch["key"]) for batch in evaluate(root)) == COUNT
    with pytest.raises(
        DataError, match=r"^[^\n]*no index of train: an earlier version [^\n]*run the stage `shard` again$"
    ):
        draw(root)


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [(remove, "missing; it is in the manifest"), (cut, "not those that"), (change, "not those that")],
)
def test_an_index_that_is_missing_or_damaged_is_one_line(shards: Path, harm: Any, told: str) -> None:
    harm(shards / index_name("train"))
    with pytest.raises(ShardError, match=rf"train\.index\.jsonl\.gz: [^\n]*{told}[^\n]*$"):
        few_shot(str(shards), "train", 1, 0)


def test_the_index_of_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    others = Path(write(tmp_path / "others", [plain(number) for number in range(COUNT)]))
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["indexes"] = json.loads((others / "manifest.json").read_text())["indexes"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    (shards / index_name("train")).write_bytes((others / index_name("train")).read_bytes())
    told = r"not the index of train-000000\.tar as the manifest has it; run the stage `shard` again$"
    with pytest.raises(ShardError, match=told):
        few_shot(str(shards), "train", 1, 0)


def test_a_key_that_comes_twice_in_one_shard_is_refused_before_the_shard_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^train: key 'k0000' comes twice, in train-000000\.tar and train-000000\.tar;"
    ):
        write(tmp_path, [plain(0), plain(1), plain(0)])
    assert list(tmp_path.iterdir()) == []
