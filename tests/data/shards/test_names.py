"""Names in a remote manifest or index become local paths, so they cannot lead out of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.shards.manifest import MANIFEST, ShardError, read_manifest
from pipelines.data.shards.stored_explanations import INDEX, read_index
from pipelines.data.shards.writer import write_shards
from tests.support.toy_source import ToySource, plain

ATTACKS = [
    ("sha256", "../../../home/of/somebody"),
    ("sha256", "/tmp/x"),
    ("sha256", "0" * 63),
    ("name", "../train-000000.tar"),
    ("name", "/train-000000.tar"),
    ("name", ".."),
    ("bytes", -1),
]


@pytest.mark.parametrize(("field", "value"), ATTACKS)
def test_a_manifest_names_files_of_its_folder_by_their_sha256(field: str, value: Any, tmp_path: Path) -> None:
    source = ToySource({"train": [plain(number) for number in range(3)]})
    write_shards(source, Path("raw"), tmp_path, shard_size=3, progress=False)
    content = json.loads((tmp_path / MANIFEST).read_text())
    content["splits"]["train"][0][field] = value
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ShardError, match=rf"{MANIFEST}: [^\n]*$"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(("field", "value"), ATTACKS)
def test_so_does_the_index_of_stored_explanations(field: str, value: Any, tmp_path: Path) -> None:
    shard = {"name": "train-000000.tar", "bytes": 1, "sha256": "0" * 64, "count": 1}
    (tmp_path / INDEX).write_text(json.dumps({"shards": [shard]}))
    assert read_index(str(tmp_path))["shards"] == [shard]
    (tmp_path / INDEX).write_text(json.dumps({"shards": [{**shard, field: value}]}))
    with pytest.raises(ShardError, match=rf"{INDEX}: [^\n]*$"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", '{"shards": 1}', '{"shards": [{}]}', '{"shards": [null]}'])
def test_an_index_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ShardError, match=rf"{INDEX}: [^\n]*$"):
        read_index(str(tmp_path))
