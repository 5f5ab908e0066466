import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines  # noqa: F401  (sets how OpenMP waits, before torch is imported)

GROUPS = ("graph", "ray")  # markers of tests that share a fixture whose setup takes minutes
NUMBERS = itertools.count()
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    # Workers of pytest share the cores. torch reads this when it is imported.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that use Ray. One pytest worker runs all tests of a group, and groups start first."""
    for item in items:
        if "ray_workers" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        group = next((name for name in GROUPS if item.get_closest_marker(name)), None)
        if IN_WORKER and group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    if IN_WORKER:
        items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Restores the number of torch's threads after each test, because `launch` sets it."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_shard_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test its own cache of remote shards."""
    # Not `mktemp`, which lists all folders on each call.
    folder = tmp_path_factory.getbasetemp() / f"shard-cache-{next(NUMBERS)}"
    folder.mkdir()
    monkeypatch.setenv("SHARD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def ray_workers() -> Iterator[None]:
    """Starts one Ray with room for three workers, to which `tests.support.toy` is pickled by value."""
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
