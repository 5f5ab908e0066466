from pathlib import Path

import pytest

import pipelines  # noqa: F401  (sets how OpenMP waits, before torch is imported)


@pytest.fixture(autouse=True)
def own_shard_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of remote shards are a test's own."""
    folder = tmp_path_factory.mktemp("shard-cache")
    monkeypatch.setenv("SHARD_CACHE", str(folder))
    return folder
