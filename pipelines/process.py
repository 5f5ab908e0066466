"""This process: how its threads wait, how it keeps memory (set before torch is imported), its cores, and processes beside it."""

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
