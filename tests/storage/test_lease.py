"""A run's directory has one driver and one writer at a time; a second driver's error names the first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage import files, lease
from pipelines.storage.errors import StorageError
from pipelines.storage.lease import LeaseError, check_held, held, newest_token, this_process, writer
from tests.support import servers


def elsewhere(function: Any, *arguments: Any) -> Any:
    """Calls the function in a thread of its own, which acts as another driver in this process."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def take(directory: str) -> lease.Lease:
    """Holds a directory and releases it at once; returns the lease."""
    with held(directory) as mine:
        return mine


def take_and_leave(directory: str) -> int:
    """Holds a directory and releases it at once; returns the token's number."""
    return take(directory).number


@contextmanager
def left_by(directory: str, alive: float, **of_holder: Any) -> Iterator[None]:
    """Writes the lease of a driver that differs from this process in `of_holder`; last heartbeat `alive`."""
    holder = replace(this_process(), **of_holder)
    token = {"number": 1, "nonce": "ab12cd34", "owner": "other", "holder": asdict(holder)}
    files.write_json(f"{directory}/lease/00000001.json", token)
    files.write_json(f"{directory}/lease/other.json", {"alive": alive})
    yield


@pytest.fixture(scope="module")
def bucket(store: servers.Storage) -> str:
    """A bucket of a server that answers every request."""
    return "s3://bucket"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces `sleep` in `lease`; returns the list of seconds that it was called with."""
    seconds: list[float] = []
    monkeypatch.setattr(lease, "sleep", seconds.append)
    return seconds


def test_the_second_driver_says_who_has_it_and_since_when(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"metadata": {"job_submission_id": "raysubmit_1234"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with held(folder) as mine:
        who = (
            rf"in use by \S+, pid {mine.holder.pid}, submission raysubmit_1234, "
            r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC;"
        )
        with pytest.raises(LeaseError, match=rf"^{re.escape(folder)}: {who}[^\n]*$"):
            elsewhere(take_and_leave, folder)
        mine.check()
        mine.check_newest()
        with held(folder) as again:  # as a stage does, and then its training
            assert again == mine
        mine.check_newest()
    assert elsewhere(take_and_leave, folder) == 2


@pytest.mark.parametrize("folder", ["path", "s3"], indirect=True)
def test_of_drivers_that_start_together_one_goes_on(folder: str) -> None:
    def drive(_: int) -> str:
        try:
            with held(folder) as mine:
                done.append(mine.token)
                barrier.wait(60)
            return "ended"
        except LeaseError as error:
            barrier.wait(60)
            return str(error)

    count, done = 3, list[str]()
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        said = sorted(pool.map(drive, range(count)))
    assert len(done) == 1
    assert said.count("ended") == 1
    assert all("in use by" in line or "taken over by" in line for line in said if line != "ended")


def test_a_driver_that_fails_leaves_the_directory_free(folder: str) -> None:
    with pytest.raises(ZeroDivisionError), held(folder):
        raise ZeroDivisionError
    assert take_and_leave(folder) == 2
    assert len(files.names_in(f"{folder}/lease")) == 1  # the last token stays, so that numbers only grow


def test_a_driver_killed_on_this_machine_is_succeeded_at_once(tmp_path: Path, waited: list[float]) -> None:
    script = f"import os\nfrom pipelines.storage.lease import held\nwith held({str(tmp_path)!r}): os._exit(9)"
    subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2])
    left = newest_token(str(tmp_path))
    assert left is not None
    assert left.number == 1
    assert take_and_leave(str(tmp_path)) == 2
    assert waited == []


@pytest.mark.parametrize(
    "of_holder",
    [{"pid": 2**31 - 1}, {"started": "1"}, {"boot": "before the power failed"}],
    ids=["no such process", "another process with its number", "the machine was started again"],
)
def test_what_is_surely_dead_is_not_waited_for(
    tmp_path: Path, waited: list[float], of_holder: dict[str, Any]
) -> None:
    with left_by(str(tmp_path), lease.time(), **of_holder):
        assert take_and_leave(str(tmp_path)) == 2
    assert waited == []


@pytest.mark.parametrize(
    "of_holder", [{"host": "far"}, {"machine": "its image's"}, {"namespace": "of another container"}]
)
def test_a_driver_elsewhere_is_waited_for_until_its_lease_has_run_out(
    tmp_path: Path, waited: list[float], of_holder: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with left_by(str(tmp_path), lease.time(), **of_holder):
        assert take_and_leave(str(tmp_path)) == 2
    assert lease.LASTS - lease.RENEW <= sum(waited) <= lease.LASTS + lease.RENEW
    assert [record.message.count("unless that shows a sign of life") for record in caplog.records] == [1]


def test_a_lease_that_has_run_out_is_taken_over_at_once(tmp_path: Path, waited: list[float]) -> None:
    with left_by(str(tmp_path), lease.time() - lease.LASTS - 1, host="far"):
        assert take_and_leave(str(tmp_path)) == 2
    assert waited == []


def test_a_driver_elsewhere_that_shows_life_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = tmp_path / "lease/other.json"
    monkeypatch.setattr(lease, "sleep", lambda _: files.write_json(sign, {"alive": 5.0}))
    with (
        left_by(str(tmp_path), lease.time(), host="far", pid=7),
        pytest.raises(LeaseError, match="in use by far, pid 7, since"),
    ):
        take_and_leave(str(tmp_path))
    assert [path.name for path in sorted((tmp_path / "lease").iterdir())] == ["00000001.json", "other.json"]


def test_a_driver_elsewhere_that_ends_meanwhile_is_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "sleep", lambda _: files.remove(tmp_path / "lease/other.json"))
    with left_by(str(tmp_path), lease.time(), host="far"):
        assert take_and_leave(str(tmp_path)) == 2


def test_a_driver_that_was_taken_for_dead_learns_who_succeeded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(str(tmp_path)) as mine:
        monkeypatch.setattr(lease, "_alive", set())  # the driver counts as dead
        assert elsewhere(take_and_leave, str(tmp_path)) == 2
        for check in (mine.check, mine.check_newest, lambda: check_held(f"{tmp_path}/trials/1")):
            with pytest.raises(LeaseError, match=r"^[^\n]*: taken over by [^\n]*, since [^\n]*$"):
                check()
        assert mine.lost
        with pytest.raises(LeaseError, match="taken over by"), writer(str(tmp_path), mine.owner):
            pass
        check_held(f"{tmp_path}-2")


def test_of_a_drivers_writers_the_newest_may_write(folder: str) -> None:
    with held(folder) as driver, writer(folder, driver.owner) as first:
        first.check_newest()
        with writer(folder, driver.owner) as second:  # the worker group that replaces the first
            second.check_newest()
            assert second.token > first.token
            with pytest.raises(StorageError, match="newer worker group"):
                first.check_newest()
        driver.check()
        assert not driver.lost
        with pytest.raises(LeaseError, match="in use by"):
            elsewhere(take_and_leave, folder)


def test_a_trial_is_its_searchs_whoever_had_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    """A search takes over its trials without waiting for workers that outlive an earlier, killed search."""
    search, trial = str(tmp_path), f"{tmp_path}/trials/1"
    with held(search) as first, held(trial, under=first) as old:
        monkeypatch.setattr(lease, "_alive", set())  # the first search's driver was killed
        with monkeypatch.context() as alive:
            second = elsewhere(take, search)
            alive.setattr(lease, "_lives", lambda *_: True)  # its worker was not killed
            new = elsewhere(lambda: held(trial, under=second).__enter__())
        new.check_newest()
        with pytest.raises(LeaseError, match="taken over by"):
            old.check_newest()
        # A restarted worker of the first search
        with pytest.raises(LeaseError, match="taken over by"):
            elsewhere(lambda: held(trial, under=first).__enter__())
        new.check_newest()
    assert waited == []


def test_a_worker_that_is_dead_is_not_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(str(tmp_path)) as driver:
        with monkeypatch.context() as worker:  # the writer is a process on another node
            worker.setattr(lease, "this_process", lambda: replace(this_process(), pid=2**31 - 1, host="node"))
            with writer(str(tmp_path), driver.owner) as group:
                assert group.holder == driver.holder
        with pytest.raises(LeaseError, match=f"in use by {driver.holder.host}, pid {driver.holder.pid},"):
            elsewhere(take_and_leave, str(tmp_path))
        driver.check()


def test_without_a_driver_a_writer_is_its_own(tmp_path: Path) -> None:
    with writer(str(tmp_path), "") as mine:
        mine.check_newest()
        with pytest.raises(LeaseError, match="in use by"):
            elsewhere(take_and_leave, str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"holder": {"pid": 1}, "owner": "a", "nonce": "b"}', b"\0\0"]
)
def test_a_token_that_a_crash_left_unreadable_is_nobodys(tmp_path: Path, content: bytes) -> None:
    files.write(tmp_path / "lease/00000004.json", content)
    assert take_and_leave(str(tmp_path)) == 5
    with held(str(tmp_path)) as mine:
        files.write(tmp_path / "lease/00000007.json", content)  # of a process that died during its takeover
        mine.check_newest()
        with pytest.raises(LeaseError, match="in use by"):
            elsewhere(take_and_leave, str(tmp_path))


def test_where_a_storage_overwrites_what_is_there_the_last_to_come_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a conditional put, two drivers may create the same number; the later token stays."""
    place = "memory://careless/run"
    with held(place) as first:
        monkeypatch.setattr(lease, "newest_token", lambda directory: None)
        monkeypatch.setattr(lease, "_numbers", lambda directory: [])
        monkeypatch.setattr(files, "create", lambda name, content: files.write(name, content) is None)
        monkeypatch.setattr(lease.Lease, "check_newest", lambda self: None)
        second = elsewhere(take, place)
        monkeypatch.undo()
        second.check_newest()
        assert second.number == first.number
        assert second.token != first.token
        with pytest.raises(LeaseError, match="taken over by"):
            first.check_newest()


def test_signs_of_life_are_shown_until_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(str(tmp_path)) as mine:
        sign, rounds = tmp_path / f"lease/{mine.owner}.json", iter([False, False, True])
        before = files.read_json(sign)
        stop = type("Stop", (), {"wait": lambda self, seconds: next(rounds)})()
        lease._renew(mine, str(sign), stop)
        assert files.read_json(sign)["alive"] > before["alive"]
        monkeypatch.setattr(lease, "_alive", set())
        elsewhere(take_and_leave, str(tmp_path))
        rounds = iter([False])
        lease._renew(mine, str(sign), stop)
        assert not sign.exists()
