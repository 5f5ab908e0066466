"""This process: its threads and its memory (set before torch is imported), its sockets, its cores, processes beside it."""

import ctypes
import math
import multiprocessing
import multiprocessing.util
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads that spin long while they wait make two busy processes several times slower, threads that never do make one process
# slower by a third: let them spin for a moment, unless the user says how. Read when torch is first imported.
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
if not _OPENMP.keys() & os.environ.keys():
    os.environ.update(_OPENMP)
OPENMP = {name: os.environ[name] for name in _OPENMP if name in os.environ}

# A training step frees its tensors' memory and takes it again. By default glibc gives large pieces back to the system each time,
# which clears them anew: a tenth of a step on CPUs. A gigabyte is kept instead. The user's own settings of malloc win.
if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    _mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if _mallopt is not None:
        for _parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD; bytes
            _mallopt(_parameter, 2**30)


SOCKET_NAME = 103 if sys.platform == "darwin" else 107  # bytes that the path of a Unix socket may have


def short_folder() -> str | None:
    """A folder for sockets whose path is short and in which this process may write; None if there is none."""
    return next(
        (folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if os.access(folder, os.W_OK | os.X_OK)), None
    )


def _shorten_socket_names() -> None:
    """Lets processes of `multiprocessing` meet in a short folder if TMPDIR is too long for the names of their sockets.

    Loader processes hand over their tensors through such sockets. Processes that this one starts inherit the folder.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:  # there is none to write to
        return
    too_long = len(os.fsencode(f"{folder}/pymp-12345678/listener-12345678")) > SOCKET_NAME
    if hasattr(socket, "AF_UNIX") and too_long and short_folder() is not None:
        try:
            tempfile.tempdir = short_folder()
            multiprocessing.util.get_temp_dir()  # makes it, once in a process, and removes it in the end
        finally:
            tempfile.tempdir = folder


_shorten_socket_names()


def cpu_count() -> int:
    """The cores that this process may use: by its affinity, and by the CPU quotas of its control groups (containers, Slurm)."""
    return max(1, min([_affinity(), *(math.ceil(quota) for quota in cpu_quotas())]))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quotas(root: str | Path = "/") -> Iterator[float]:
    """How many cores' time each control group around this process allows, if it sets a bound; v1 and v2 of control groups.

    The path of a group may be that on the host while only the group itself is mounted: all of the path's folders are tried.

    Args:
        root: where `proc` and `sys` are.
    """
    for line in _text(Path(root, "proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(name.lstrip("/"))
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            for folder in (Path(root, "sys/fs/cgroup", mount, each) for each in (group, *group.parents)):
                bound = _text(folder / "cpu.max") or _text(folder / "cpu.cfs_quota_us") + _text(
                    folder / "cpu.cfs_period_us"
                )
                quota, period = [*bound.split(), "", ""][:2]
                if quota.isdecimal() and period.isdecimal():  # not `max` or -1: no bound
                    yield int(quota) / int(period)


def _text(path: Path) -> str:
    """The content of a file of the system; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


if cpu_count() < _affinity():  # OpenMP knows the affinity alone
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_count()))


def mapped(function: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """`function` of each item in their order, in up to `processes` processes; after an error no further item is begun."""
    processes = min(processes, len(items))
    if processes < 2:
        yield from map(function, items)
        return
    # Spawned, not forked: the caller may have threads, and a fork would copy their locks as they are.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, items)  # which cancels the items not yet begun when it ends early


@contextmanager
def environment(variable: str, value: str) -> Iterator[None]:
    """Sets an environment variable meanwhile."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
