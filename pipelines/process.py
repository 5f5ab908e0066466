"""Settings and limits of this process: OpenMP threads, malloc, sockets, cores, worker processes.

Importing this module applies the settings. Import it before torch, because torch reads OpenMP's settings as
it loads.
"""

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

# OpenMP threads that busy-wait for long make two busy processes several times slower. Threads that never
# busy-wait make a single process slower by a third. So they spin briefly, unless the user has set one of
# these variables.
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
if not _OPENMP.keys() & os.environ.keys():
    os.environ.update(_OPENMP)
OPENMP = {name: os.environ[name] for name in _OPENMP if name in os.environ}

# Each training step frees its tensors and allocates them again. By default glibc returns large blocks to the
# system, which has to zero them again: a tenth of the step's time on CPUs. With these settings glibc keeps up
# to a gigabyte. The user's own malloc settings take precedence.
if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    _mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # None in other C libraries
    if _mallopt is not None:
        for _parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD; bytes
            _mallopt(_parameter, 2**30)


SOCKET_NAME = 103 if sys.platform == "darwin" else 107  # longest path of a Unix socket, in bytes


def short_folder() -> str | None:
    """A writable folder with a short path, for sockets; `None` if there is none."""
    return next(
        (folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if os.access(folder, os.W_OK | os.X_OK)), None
    )


def _shorten_socket_names() -> None:
    """Moves the sockets of `multiprocessing` to a short folder if their paths in TMPDIR are too long.

    Loader processes send their tensors through such sockets. Child processes inherit the folder.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:  # no writable temporary folder
        return
    too_long = len(os.fsencode(f"{folder}/pymp-12345678/listener-12345678")) > SOCKET_NAME
    if hasattr(socket, "AF_UNIX") and too_long and short_folder() is not None:
        try:
            tempfile.tempdir = short_folder()
            multiprocessing.util.get_temp_dir()  # created once per process, and deleted at its exit
        finally:
            tempfile.tempdir = folder


_shorten_socket_names()


def cpu_count() -> int:
    """Number of cores that this process may use.

    The minimum of its CPU affinity and the CPU quotas of its control groups (containers, Slurm); at least 1.
    """
    return max(1, min([_affinity(), *(math.ceil(quota) for quota in cpu_quotas())]))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quotas(root: str | Path = "/") -> Iterator[float]:
    """Yields the CPU quotas, in cores, of the control groups (v1 or v2) around this process.

    In a container, `/proc` may name a group by its path on the host although only the group itself is
    mounted. So the group's path and all its parents are tried.

    Args:
        root: folder that holds `proc` and `sys`.
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
                if quota.isdecimal() and period.isdecimal():  # without a quota, `max` (v2) or -1 (v1)
                    yield int(quota) / int(period)


def _text(path: Path) -> str:
    """The content of a system file; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


if cpu_count() < _affinity():  # OpenMP knows the affinity, but no quotas
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_count()))


def mapped(function: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """Yields `function(item)` for each item, in order, computed in up to `processes` processes.

    After an error, no further item is started.
    """
    processes = min(processes, len(items))
    if processes < 2:
        yield from map(function, items)
        return
    # Spawned, not forked: a fork would copy the locks that the caller's other threads hold at that moment.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, items)  # if it ends early, `pool.map` cancels the items not yet started


@contextmanager
def environment(variable: str, value: str) -> Iterator[None]:
    """Sets an environment variable within the block."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
