"""Leases: one driver at a time may write to a run's directory, through its newest writer only.

    <directory>/lease/00000003.json   a token (who took it, and when); immutable; the highest number is valid
    <directory>/lease/<owner>.json    heartbeat of the driver `owner`; the driver deletes it when it ends

A driver is the process of a stage. The driver takes a token, and so does each worker group that it starts.
Taking a token means creating the file with the next number, which only one process can do (`files.create`).

A writer checks before each write that its token is still the newest. It also puts the token into the names of
files that nobody else may overwrite or delete. So a driver that was wrongly taken for dead stops at its next
write. If the takeover falls between its check and that write, the file has the old token in its name and
overwrites nothing.

This also holds on a storage without a conditional put. If two processes create the same number there, the
last token stays. The other process finds a foreign token at its next check, and the names of their files
differ because each token has a random part.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from time import gmtime, sleep, strftime, time

from pipelines.errors import UserError
from pipelines.storage import files
from pipelines.storage.errors import StorageError
from pipelines.storage.retry import RETRY_SECONDS

log = logging.getLogger(__name__)

LASTS = RETRY_SECONDS  # seconds that a driver on another machine counts as alive after its last heartbeat
RENEW = 20.0  # seconds between heartbeats
_NUMBER = re.compile(r"^(\d{8,})\.json$")
_SUBMISSION = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job


class LeaseError(UserError, RuntimeError):
    """Another driver holds the directory. The message is one line that names that driver and since when."""


@dataclass(frozen=True)
class Holder:
    """Identifies a process, so that other processes can tell if it is still alive."""

    host: str
    machine: str  # machine id
    boot: str  # boot id of the machine; changes at each restart
    namespace: str  # PID namespace of `pid`
    pid: int
    started: str  # start time of the process; tells it from a later process with the same `pid`
    submission: str  # submission id if it is the driver of a Ray job, else empty
    since: float  # when it took the lease, in seconds since 1970

    def __str__(self) -> str:
        submission = f", submission {self.submission}" if self.submission else ""
        return (
            f"{self.host}, pid {self.pid}{submission}, "
            f"since {strftime('%Y-%m-%d %H:%M:%S UTC', gmtime(self.since))}"
        )


@dataclass(frozen=True)
class Lease:
    """The right to write to `directory`, as its driver or as a writer of that driver. Picklable."""

    directory: str
    number: int
    nonce: str
    owner: str  # random name of the driver
    holder: Holder

    @property
    def token(self) -> str:
        """Number and nonce, for the names of files."""
        return f"{self.number:08d}-{self.nonce}"

    def check(self) -> None:
        """Raises `LeaseError` if another driver has taken the directory over."""
        self._newest()

    def check_newest(self) -> None:
        """Raises `LeaseError` as `check`, and `StorageError` if the driver has a newer writer."""
        if self._newest().token != self.token:
            raise StorageError(f"{self.directory}: a newer worker group of the same driver writes here now")

    @property
    def lost(self) -> bool:
        """True if another driver has taken the directory over; False while the storage cannot be reached."""
        try:
            self.check()
        except LeaseError:
            return True
        except OSError:
            pass  # the storage does not answer, so no other driver is known
        return False

    def _newest(self) -> Lease:
        """The newest token of this driver; raises `LeaseError` if another driver has taken over."""
        newest = newest_token(self.directory)
        if newest is None or newest.owner != self.owner:
            raise _taken_over(self.directory, newest)
        return newest


_held: ContextVar[tuple[Lease, ...]] = ContextVar("_held", default=())  # leases that this thread holds
_alive: set[tuple[str, str]] = set()  # (directory, owner) of each driver in this process


@contextmanager
def held(directory: str, under: Lease | None = None) -> Iterator[Lease]:
    """Makes this process the driver of `directory` within the block; a nested block gets the same lease.

    The lease of a dead driver is taken over. If that driver ended by itself or ran in this PID namespace,
    this happens at once. Otherwise this process waits until `LASTS` seconds have passed since the driver's
    last heartbeat.

    Args:
        directory: path or fsspec URL of the run's directory.
        under: lease of a parent folder, for whose driver this process works. `directory` is then taken over
            from any earlier holder, dead or alive. Example: the trial of a search whose earlier driver was
            killed.

    Raises:
        LeaseError: another driver holds the directory.
    """
    directory = directory.rstrip("/")
    for lease in _held.get():
        if lease.directory == directory:
            yield lease
            return
    if under is not None:
        under.check()
    owner = under.owner if under else secrets.token_hex(8)
    sign, stop = _sign(directory, owner), threading.Event()
    _alive.add((directory, owner))
    try:
        _show_life(sign)
        lease = _take(directory, owner, wait=under is None)
    except BaseException:
        _release(directory, owner)
        raise
    renewing = threading.Thread(target=_renew, args=(lease, sign, stop), daemon=True)
    renewing.start()
    within = _held.set((*_held.get(), lease))
    try:
        yield lease
    finally:
        _held.reset(within)
        stop.set()
        renewing.join()
        _release(directory, owner)


def check_held(place: str) -> None:
    """Raises `LeaseError` if another driver has taken over a lease of this thread on `place` or a parent."""
    for lease in _held.get():
        if f"{place}/".startswith(f"{lease.directory}/"):
            lease.check()


@contextmanager
def writer(directory: str, owner: str) -> Iterator[Lease]:
    """Yields a new token of the driver `owner`, whose earlier writers may then no longer write.

    If `owner` is empty, this process becomes the driver itself; see `held`.

    Raises:
        LeaseError: another driver holds the directory.
    """
    if owner:
        yield _take(directory.rstrip("/"), owner, own=True)
        return
    with held(directory) as lease:
        yield lease


def newest_token(directory: str) -> Lease | None:
    """The newest token of a directory; `None` if nobody has taken one."""
    while True:
        numbers = _numbers(directory)
        for number in reversed(numbers):
            if (lease := _read(directory, number)) is not None:
                return lease
        if _numbers(directory) == numbers:  # else the tokens were replaced during the loop
            return None


def _numbers(directory: str) -> list[int]:
    """Numbers of the tokens of a directory, ascending."""
    return sorted(
        int(match[1]) for match in map(_NUMBER.match, files.names_in(f"{directory}/lease")) if match
    )


def _read(directory: str, number: int) -> Lease | None:
    """The token with this number; `None` if it is deleted or unreadable.

    A process writes its token first, so the process of an unreadable token has written nothing else.
    """
    content = files.read_record(_path(directory, number), dict) or {}
    with suppress(KeyError, TypeError):
        return Lease(directory, number, content["nonce"], content["owner"], Holder(**content["holder"]))
    return None


def _path(directory: str, number: int) -> str:
    return f"{directory}/lease/{number:08d}.json"


def _sign(directory: str, owner: str) -> str:
    return f"{directory}/lease/{owner}.json"


def _take(directory: str, owner: str, own: bool = False, wait: bool = True) -> Lease:
    """Takes the next token for the driver `owner`.

    Args:
        directory: directory of the run.
        owner: name of the driver.
        own: the driver already holds the directory and takes a later token for a writer.
        wait: first waits until the present driver is dead, or raises `LeaseError` if it is alive.
    """
    while True:
        # Listed before the newest token is read: a token taken in between has the number that is created
        # below, and `files.create` then fails.
        numbers = _numbers(directory)
        newest, holder = newest_token(directory), this_process()
        if own:
            if newest is None or newest.owner != owner:
                raise _taken_over(directory, newest)
            holder = newest.holder  # the driver's, not the writer's
        elif wait and newest is not None:
            _wait_for_its_end(newest)
        lease = Lease(directory, max(numbers, default=0) + 1, secrets.token_hex(4), owner, holder)
        content = {name: value for name, value in asdict(lease).items() if name != "directory"}
        if files.create(_path(directory, lease.number), json.dumps(content).encode()):
            break  # otherwise another process has created this number
    lease.check_newest()
    for number in numbers:
        files.remove(_path(directory, number))
    if newest is not None and newest.owner != owner:
        files.remove(_sign(directory, newest.owner))
    return lease


def _taken_over(directory: str, by: Lease | None) -> LeaseError:
    """The error for a driver that no longer holds `directory`."""
    how = f"taken over by {by.holder}" if by else "its lease was deleted"
    return LeaseError(f"{directory}: {how}; this driver stops here")


def _wait_for_its_end(lease: Lease) -> None:
    """Waits until the driver of the lease has ended or counts as dead; raises `LeaseError` if it lives."""
    sign, holder, here = _sign(lease.directory, lease.owner), lease.holder, this_process()
    in_use = LeaseError(f"{lease.directory}: in use by {holder}; wait until that has ended, or stop it")
    last = files.read_record(sign, dict)
    if last is None:
        return
    if (holder.host, holder.machine) == (here.host, here.machine):
        if holder.boot != here.boot:
            return
        if holder.namespace == here.namespace:
            if _lives(lease, here):
                raise in_use
            return
    left = min(last.get("alive", 0.0) + LASTS - time(), LASTS)
    if left > 0:
        log.warning(
            "%s: left by %s; taken over in %.0f s unless that shows a sign of life",
            lease.directory,
            holder,
            left,
        )
    while left > 0:
        sleep(RENEW / 4)
        left -= RENEW / 4
        now = files.read_record(sign, dict)
        if now is None:
            return
        if now != last:
            raise in_use


def _lives(lease: Lease, here: Holder) -> bool:
    """True if the driver of the lease, which ran on this machine, is alive."""
    holder = lease.holder
    if (holder.pid, holder.started) == (here.pid, here.started):
        return (lease.directory, lease.owner) in _alive
    return holder.started == _started(holder.pid)


def _show_life(sign: str) -> None:
    files.write_json(sign, {"alive": time()})


def _renew(lease: Lease, sign: str, stop: threading.Event) -> None:
    """Writes heartbeats until `stop` is set or another driver has taken over."""
    while not stop.wait(RENEW):
        with suppress(OSError):  # while the storage cannot be reached, no other driver can take over either
            if lease.lost:
                return
            _show_life(sign)


def _release(directory: str, owner: str) -> None:
    """Ends a lease, so that the next driver need not wait."""
    _alive.discard((directory, owner))
    with suppress(OSError):  # without the deletion, the lease expires by itself
        files.remove(_sign(directory, owner))


def this_process() -> Holder:
    """The identity of this process, with the current time as `since`."""
    job = json.loads(os.environ.get(_SUBMISSION) or "{}").get("metadata") or {}
    return Holder(
        host=socket.gethostname(),
        machine=_text("/etc/machine-id"),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        namespace=os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        pid=os.getpid(),
        started=_started(os.getpid()),
        submission=job.get("job_submission_id", ""),
        since=time(),
    )


def _text(path: str) -> str:
    """The content of a system file; empty if it cannot be read."""
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _started(pid: int) -> str:
    """Start time of process `pid` of this machine, in clock ticks since boot; empty if it is not running.

    Without `/proc`, returns `unknown` for every running process.
    """
    with suppress(OSError):
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "XZ" else numbers[18]
    if os.path.exists("/proc/self/stat"):
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # a living process of another user
    return "unknown"
