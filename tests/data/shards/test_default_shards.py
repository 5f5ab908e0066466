"""The embedded data set is frozen, because docs/results.md reports results on exactly these bytes."""

from hashlib import sha256
from pathlib import Path

import pytest

from pipelines import params
from pipelines.data import sources
from pipelines.data.shards.writer import write_shards

ROOT = Path(__file__).parents[3]
EXPECTED = Path(__file__).with_name("default_shards.sha256")  # in the format of `sha256sum`


@pytest.mark.graph
def test_the_default_shards_are_these_bytes(tmp_path):
    dataset = params.load(ROOT / "params.yaml").datasets["objects"]
    source = sources.get(dataset)
    source.fetch(tmp_path / "raw", tmp_path / "cache", progress=False)
    write_shards(
        source, tmp_path / "raw", str(tmp_path / "shards"), shard_size=dataset.shard_size, progress=False
    )
    written = {
        path.name: sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "shards").glob("*.tar")
    }
    expected = dict(reversed(line.split()) for line in EXPECTED.read_text().splitlines())
    assert written == expected
