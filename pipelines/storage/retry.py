"""Retries of calls to remote storage at any fsspec URL, ever later, while the error is transient."""

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

RETRY_SECONDS = 300.0  # for which a storage may fail without a break
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0  # seconds between tries; they double
CLIENTS = {
    "aiobotocore",
    "aiohttp",
    "azure",
    "botocore",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
}  # raise errors of their own
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
    """Whether `place` (a path or fsspec URL) is anywhere but in this machine's file system."""
    return fsspec.utils.get_protocol(str(place)) not in ("file", "local")


def retried(function: Callable[Concatenate[Place, P], T]) -> Callable[Concatenate[Place, P], T]:
    """`function`, whose first argument is a path or URL, with `retry` around each call."""

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
    """Returns `call()`, called again, ever later, while the storage raises transient errors.

    A local place is tried once. So is a call within a call that is being retried: the outer one is called again.

    Args:
        call: must do the same when it is called again.
        place: the path or URL that the call is about.
        seconds: after which no call begins; by default `RETRY_SECONDS`.
        clock: returns the time in seconds.
        sleep: waits for seconds.

    Raises:
        StorageError: the storage does not answer, or there are no credentials for it.
        OSError: the place does not exist or is not allowed; at once.
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
        sleep(wait * random.SystemRandom().uniform(0.5, 1.0))  # not the generators that training draws from
        wait = min(2 * wait, LONGEST_WAIT)


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, OSError):
        return not isinstance(error, FINAL) and error.errno not in FULL
    status = getattr(error, "status", 0)  # of aiohttp: an HTTP server that refuses would refuse again
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return False
    return of_a_client(error) and "Credentials" not in type(error).__name__


def of_a_client(error: Exception) -> bool:
    """Whether a storage's client raised an error of its own kind."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def as_os_error(error: Exception, place: str | Path) -> Exception:
    """`error` itself, or a `StorageError` in the place of one of a storage's client."""
    if not of_a_client(error) or isinstance(error, OSError):
        return error
    hint = (
        ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if "Credentials" in type(error).__name__ else ""
    )
    return StorageError(f"{place}: {one_line(error)}{hint}")
