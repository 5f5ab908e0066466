from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines  # noqa: F401  (sets how OpenMP waits, before torch is imported)


@pytest.fixture(autouse=True)
def own_shard_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of remote shards are a test's own."""
    folder = tmp_path_factory.mktemp("shard-cache")
    monkeypatch.setenv("SHARD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def ray_workers() -> Iterator[None]:
    """One Ray with room for three workers, for all tests that need one; `tests.support.toy` travels to them by value."""
    from ray import cloudpickle

    from pipelines.params import TrainingParams
    from pipelines.training import cluster
    from tests.support import toy

    cloudpickle.register_pickle_by_value(toy)
    with cluster(TrainingParams(workers=3)):
        yield
    cloudpickle.unregister_pickle_by_value(toy)


@pytest.fixture
def uninterrupted(tmp_path: Path) -> object:
    """The toy job, run in this process from start to end."""
    from pipelines.training import train
    from tests.support import toy

    return train(toy.toy_job(tmp_path / "uninterrupted"))
