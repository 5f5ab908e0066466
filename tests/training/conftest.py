from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_workers() -> Iterator[None]:
    """One Ray with room for three workers, for all tests that need one; `toy` travels to them by value."""
    import toy
    from ray import cloudpickle

    from pipelines.params import TrainingParams
    from pipelines.training import cluster

    cloudpickle.register_pickle_by_value(toy)
    with cluster(TrainingParams(workers=3)):
        yield
    cloudpickle.unregister_pickle_by_value(toy)


@pytest.fixture
def uninterrupted(tmp_path: Path) -> object:
    """The toy job, run in this process from start to end."""
    import toy

    from pipelines.training import train

    return train(toy.toy_job(tmp_path / "uninterrupted"))
