from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.support import servers


@pytest.fixture(scope="module")
def store() -> Iterator[servers.Storage]:
    """An S3 server, with a bucket."""
    with servers.Storage() as storage, pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": storage.url, **servers.KEYS}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # may exist: moto keeps buckets in the process
        yield storage
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def bucket(store: servers.Storage) -> str:
    """A bucket of a server that refuses every fifth request."""
    store.share = 0.2
    return "s3://bucket"


@pytest.fixture(params=["path", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that does not exist yet."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    places = {
        "path": str(tmp_path / "a/b"),
        "file": f"file://{tmp_path}/a/b",
        "memory": f"memory://files/{tmp_path.name}",
    }
    return places[request.param]
