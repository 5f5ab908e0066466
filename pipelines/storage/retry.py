"""Retries calls to a remote storage (any fsspec URL) on transient errors, with exponential backoff."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import fsspec

from pipelines.errors import redacted
from pipelines.storage.errors import StorageError, one_line

log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")
Place = TypeVar("Place", str, Path, str | Path)

RETRY_SECONDS = 300.0  # how long after its first try a call is still retried
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0  # seconds between tries; doubled after each try
# Packages of storage clients, which raise exceptions of their own types
CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}
FINAL = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    StorageError,
)
FULL = (errno.ENOSPC, errno.EDQUOT)
_retrying = ContextVar("_retrying", default=False)


def is_remote(place: str | Path) -> bool:
    """Returns True if `place` (a path or fsspec URL) is not in this machine's file system."""
    return fsspec.utils.get_protocol(str(place)) not in ("file", "local")


def retried(function: Callable[Concatenate[Place, P], T]) -> Callable[Concatenate[Place, P], T]:
    """Decorator: calls a function, whose first argument is a path or URL, through `retry`."""

    @wraps(function)
    def with_retries(place: Place, *args: P.args, **kwargs: P.kwargs) -> T:
        return retry(partial(function, place, *args, **kwargs), place)

    return with_retries


def retry(
    call: Callable[[], T],
    place: str | Path,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Returns `call()`; repeats the call, with growing pauses, while the storage raises transient errors.

    A call for a local place is never repeated. A call inside another retried call is not repeated either,
    because the outer call is.

    Args:
        call: must be idempotent.
        place: the path or URL that the call is about.
        seconds: how long after the first call an error is still retried; by default `RETRY_SECONDS`.
        clock: returns the time in seconds.
        sleep: waits for a number of seconds.

    Raises:
        StorageError: the storage does not answer, or there are no credentials for it.
        OSError: the place does not exist or access is denied; raised without a retry.
    """
    if not is_remote(place) or _retrying.get():
        return call()
    end, wait = clock() + (RETRY_SECONDS if seconds is None else seconds), FIRST_WAIT
    while True:
        token = _retrying.set(True)
        try:
            return call()
        except Exception as error:
            if not is_transient(error) or clock() >= end:
                raise as_os_error(error, place) from error
            if wait == FIRST_WAIT:
                told = (redacted(str(place)), one_line(error), end - clock())
                log.warning("%s: %s; trying again for up to %.0f s", *told)
        finally:
            _retrying.reset(token)
        sleep(wait * random.SystemRandom().uniform(0.5, 1.0))  # leaves the RNG state of the training alone
        wait = min(2 * wait, LONGEST_WAIT)


def is_transient(error: Exception) -> bool:
    """Returns True if the same call may succeed later."""
    if isinstance(error, OSError):
        return not isinstance(error, FINAL) and error.errno not in FULL
    # aiohttp's errors have the HTTP status. Client errors (4xx) would recur, except for timeout and rate
    # limit.
    status = getattr(error, "status", 0)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return False
    return of_a_client(error) and "Credentials" not in type(error).__name__


def of_a_client(error: Exception) -> bool:
    """Returns True if the type of `error` belongs to a storage client."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def as_os_error(error: Exception, place: str | Path) -> Exception:
    """Converts an error of a storage client to a `StorageError`; returns other errors unchanged."""
    if not of_a_client(error) or isinstance(error, OSError):
        return error
    hint = (
        ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if "Credentials" in type(error).__name__ else ""
    )
    return StorageError(f"{place}: {one_line(error)}{hint}")
