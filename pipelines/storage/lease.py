"""Who may write to a run's directory: one driver at a time, and of its writers the newest.

    <directory>/lease/00000003.json   a token: who took it, and when. It never changes; the one with the highest number counts
    <directory>/lease/<owner>.json    when the driver of that name was last alive; a driver that ends deletes it

A driver is the process of a stage. It takes a token, and so does each worker group that it starts: it creates the file of the
next number, which only one process can do (`files.create`). Whoever writes asks before each write whether its token is still the
newest, and puts the token into the names of files that nobody else may overwrite or delete. A driver that was taken for dead, but
is not, therefore stops at its next write. What it writes between the question and that write is under a name of its own.

This also holds on a storage without a conditional put. If two processes create the same number there, the last one stays: the
other one finds a foreign token when it asks, and the names of their files differ in the random part of the token.
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

LASTS = (
    RETRY_SECONDS  # seconds after its last sign of life in which a driver on another machine counts as alive
)
RENEW = 20.0  # seconds between signs of life
_NUMBER = re.compile(r"^(\d{8,})\.json$")
_SUBMISSION = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job


class LeaseError(UserError, RuntimeError):
    """Another driver has the directory: one line that says which, and since when."""


@dataclass(frozen=True)
class Holder:
    """A process, as others recognise it."""

    host: str
    machine: str  # its id
    boot: str  # of the machine: another one after it was started again
    namespace: str  # in which `pid` counts
    pid: int
    started: str  # of the process: a later one with the same number has another
    submission: str  # of the Ray job that it is the driver of; empty if of none
    since: float  # seconds since 1970, when it took the lease

    def __str__(self) -> str:
        submission = f", submission {self.submission}" if self.submission else ""
        return f"{self.host}, pid {self.pid}{submission}, since {strftime('%Y-%m-%d %H:%M:%S UTC', gmtime(self.since))}"


@dataclass(frozen=True)
class Lease:
    """The right to write to `directory` as its driver or one of that driver's writers; picklable."""

    directory: str
    number: int
    nonce: str
    owner: str  # of the driver
    holder: Holder

    @property
    def token(self) -> str:
        """For the names of files."""
        return f"{self.number:08d}-{self.nonce}"

    def check(self) -> None:
        """Raises `LeaseError` if another driver has taken the directory over."""
        self._newest()

    def check_newest(self) -> None:
        """Raises `LeaseError` as `check` does, and `StorageError` if a later writer of the same driver has taken over."""
        if self._newest().token != self.token:
            raise StorageError(f"{self.directory}: a newer worker group of the same driver writes here now")

    @property
    def lost(self) -> bool:
        """Whether another driver has taken the directory over; False also while the storage does not say."""
        try:
            self.check()
        except LeaseError:
            return True
        except OSError:
            pass
        return False

    def _newest(self) -> Lease:
        """The newest token, which is of this driver."""
        newest = newest_token(self.directory)
        if newest is None or newest.owner != self.owner:
            raise _taken_over(self.directory, newest)
        return newest


_held: ContextVar[tuple[Lease, ...]] = ContextVar("_held", default=())  # by this thread
_alive: set[tuple[str, str]] = set()  # (directory, owner) of the drivers in this process


@contextmanager
def held(directory: str, under: Lease | None = None) -> Iterator[Lease]:
    """Holds the directory for this process as its driver; within such a block, once more, it is the same lease.

    The lease of a driver that is dead is taken over: at once if it ended by itself or ran on this machine, otherwise `LASTS`
    seconds after its last sign of life, for which this process waits.

    Args:
        directory: of the run, a path or fsspec URL.
        under: lease of a folder around it, for whose driver this process works. Whoever had `directory` before has then lost it,
            alive or not, such as a trial of a search whose driver was killed.

    Raises:
        LeaseError: another driver has the directory.
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
    """Raises `LeaseError` if another driver has taken over `place`, or a folder around it, that this thread holds."""
    for lease in _held.get():
        if f"{place}/".startswith(f"{lease.directory}/"):
            lease.check()


@contextmanager
def writer(directory: str, owner: str) -> Iterator[Lease]:
    """A later token of the driver `owner`, whose earlier writers may then no longer write; if `owner` is empty see `held`.

    Raises:
        LeaseError: another driver has the directory.
    """
    if owner:
        yield _take(directory.rstrip("/"), owner, own=True)
        return
    with held(directory) as lease:
        yield lease


def newest_token(directory: str) -> Lease | None:
    """The newest token of a directory; None if nobody has taken one."""
    while True:
        numbers = _numbers(directory)
        for number in reversed(numbers):
            if (lease := _read(directory, number)) is not None:
                return lease
        if _numbers(directory) == numbers:  # else they were replaced while this process read them
            return None


def _numbers(directory: str) -> list[int]:
    """Numbers of the tokens of a directory, the newest last."""
    return sorted(
        int(match[1]) for match in map(_NUMBER.match, files.names_in(f"{directory}/lease")) if match
    )


def _read(directory: str, number: int) -> Lease | None:
    """The token of this number; None if it is gone, or unreadable: then its process died before it could write anything else."""
    content = files.read_record(_path(directory, number), dict) or {}
    with suppress(KeyError, TypeError):
        return Lease(directory, number, content["nonce"], content["owner"], Holder(**content["holder"]))
    return None


def _path(directory: str, number: int) -> str:
    return f"{directory}/lease/{number:08d}.json"


def _sign(directory: str, owner: str) -> str:
    return f"{directory}/lease/{owner}.json"


def _take(directory: str, owner: str, own: bool = False, wait: bool = True) -> Lease:
    """Takes the next token for the driver `owner`: a later one of its own, or one after another driver's end if `wait`."""
    while True:
        numbers = _numbers(
            directory
        )  # before the newest one is judged: a later one has the number that is to be created
        newest, holder = newest_token(directory), this_process()
        if own:
            if newest is None or newest.owner != owner:
                raise _taken_over(directory, newest)
            holder = newest.holder  # the driver
        elif wait and newest is not None:
            _wait_for_its_end(newest)
        lease = Lease(directory, max(numbers, default=0) + 1, secrets.token_hex(4), owner, holder)
        content = {name: value for name, value in asdict(lease).items() if name != "directory"}
        if files.create(_path(directory, lease.number), json.dumps(content).encode()):
            break  # otherwise somebody was faster
    lease.check_newest()
    for number in numbers:
        files.remove(_path(directory, number))
    if newest is not None and newest.owner != owner:
        files.remove(_sign(directory, newest.owner))
    return lease


def _taken_over(directory: str, by: Lease | None) -> LeaseError:
    """The error of a driver that holds `directory` no longer."""
    how = f"taken over by {by.holder}" if by else "its lease was deleted"
    return LeaseError(f"{directory}: {how}; this driver stops here")


def _wait_for_its_end(lease: Lease) -> None:
    """Returns once the driver of the lease is dead or has ended; raises `LeaseError` as soon as it shows that it is alive."""
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
    """Whether a driver on this machine is alive."""
    holder = lease.holder
    if (holder.pid, holder.started) == (here.pid, here.started):
        return (lease.directory, lease.owner) in _alive
    return holder.started == _started(holder.pid)


def _show_life(sign: str) -> None:
    files.write_json(sign, {"alive": time()})


def _renew(lease: Lease, sign: str, stop: threading.Event) -> None:
    """Shows that this process is alive, until `stop` is set or another driver has taken over."""
    while not stop.wait(RENEW):
        with suppress(OSError):  # the storage is away: also for others
            if lease.lost:
                return
            _show_life(sign)


def _release(directory: str, owner: str) -> None:
    """Ends a lease, so that the next driver need not wait."""
    _alive.discard((directory, owner))
    with suppress(OSError):  # it runs out
        files.remove(_sign(directory, owner))


def this_process() -> Holder:
    """This process, which holds from now on."""
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
    """The content of a file of the system; empty if there is none."""
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _started(pid: int) -> str:
    """When a process of this machine was started; empty if there is none. The same for all if the system does not say."""
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
        pass
    return "unknown"
