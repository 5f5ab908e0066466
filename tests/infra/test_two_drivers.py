"""Two drivers of one run on S3, in two processes, and one that is killed (`make test-infra`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from pipelines.training import Result, checkpoints, train
from tests.support import servers
from tests.support.driver import PRELUDE, ROOT
from tests.support.toy import identical, toy_job, weights

pytestmark = [pytest.mark.infra, pytest.mark.timeout(600)]
DRIVE = """
import sys, time
from functools import partial
from pipelines.errors import UserError
from pipelines.training import train

class Waiting(toy.ToyMethod):
    def prepare(self, batch):
        if batch["step"] == 8:
            Path(self.marker, "there").touch()
            while not Path(self.marker, "go").exists():
                time.sleep(0.05)
        return super().prepare(batch)

cloudpickle.register_pickle_by_value(sys.modules["__main__"])
try:
    train(toy.toy_job({directory!r}, partial(Waiting, marker={folder!r}), workers={workers}))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Storage]:
    """An S3 server that refuses every tenth request."""
    with servers.Storage() as storage:
        for name, value in {"AWS_ENDPOINT_URL": storage.url, **servers.KEYS}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        # All S3 servers of this process share their buckets.
        if not (s3 := s3fs.S3FileSystem()).exists("drivers"):
            s3.mkdir("drivers")
        storage.share = 0.1
        yield storage
        s3fs.S3FileSystem.clear_instance_cache()


def drive(directory: str, folder: Path, workers: int) -> subprocess.Popen[str]:
    """Starts a driver that waits at step 8 for the file `folder/go`."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT)
    }
    script = PRELUDE + DRIVE.format(directory=directory, folder=str(folder), workers=workers)
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(folder: Path, driver: subprocess.Popen[str]) -> None:
    """Waits until a driver waits at its step."""
    while not (folder / "there").exists():
        assert driver.poll() is None, driver.stderr.read()[-3000:] if driver.stderr else ""
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_driver_goes_on_and_the_other_says_who_has_the_run(
    storage: servers.Storage, tmp_path: Path, uninterrupted: Result, workers: int
) -> None:
    directory = f"s3://drivers/{tmp_path.name}"
    first = drive(directory, tmp_path, workers)
    wait_for_step(tmp_path, first)
    second = drive(directory, tmp_path, workers)
    said = second.communicate()[1].strip().splitlines()
    assert second.returncode == 1
    assert said[-1].startswith(f"{directory}: in use by ")
    assert f", pid {first.pid}, since " in said[-1]
    (tmp_path / "go").touch()
    first.communicate()
    assert first.returncode == 0
    assert identical(checkpoints.load(directory, 18)["model"], weights(uninterrupted))


def test_a_driver_that_was_killed_is_succeeded_at_once(
    storage: servers.Storage, tmp_path: Path, uninterrupted: Result
) -> None:
    directory = f"s3://drivers/{tmp_path.name}"
    first = drive(directory, tmp_path, 0)
    wait_for_step(tmp_path, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    result = train(toy_job(directory))
    assert identical(weights(result), weights(uninterrupted))
    assert [record["epoch"] for record in result.history] == [1, 2, 3]
