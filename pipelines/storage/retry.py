"""Calls to storage on other machines, at any fsspec URL, again and again while it fails for a while."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import fsspec

from pipelines.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")

PATIENCE = 300.0  # seconds for which a storage may fail without a break
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0  # seconds between tries; they double
CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}  # raise errors of their own
FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
FULL = (errno.ENOSPC, errno.EDQUOT)
BUCKETS = {"abfs", "abfss", "az", "gcs", "gs", "s3", "s3a"}  # have no folders


class StorageError(UserError, OSError):
    """A storage does not answer, or not to us: one line that names it and the cause."""


def is_remote(place: str | Path) -> bool:
    """Whether `place` (a path or fsspec URL) is anywhere but in this machine's file system."""
    return fsspec.utils.get_protocol(str(place)) not in ("file", "local")


def patient(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """`function`, whose first argument is a place, called again while a remote storage fails there: see `with_patience`."""

    @wraps(function)
    def tried(place: str, *args: P.args, **kwargs: P.kwargs) -> T:
        return with_patience(partial(function, place, *args, **kwargs), place)

    return tried


def with_patience(
    call: Callable[[], T],
    place: str,
    patience: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `call()` returns, called again, ever later, while the storage fails in a way that may pass.

    Args:
        call: does the same when it is called again.
        place: the path or URL it is about. What is on this machine is tried once.
        patience: seconds after which no call begins; by default `PATIENCE`.
        clock: tells seconds.
        sleep: waits for seconds.

    Raises:
        StorageError: the storage does not answer, or has no credentials.
        OSError: what is not there or not allowed, at once.
    """
    if not is_remote(place):
        return call()
    end, wait = clock() + (PATIENCE if patience is None else patience), FIRST_WAIT
    while True:
        try:
            return call()
        except Exception as error:
            if not passes(error) or clock() >= end:
                raise explained(error, place) from error
            if wait == FIRST_WAIT:
                log.warning("%s: %s; trying again for up to %.0f s", place, in_short(error), end - clock())
        sleep(wait * random.SystemRandom().uniform(0.5, 1.0))  # not the generators that training draws from
        wait = min(2 * wait, LONGEST_WAIT)


def passes(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, OSError):
        return not isinstance(error, FINAL) and error.errno not in FULL
    return of_a_client(error) and "Credentials" not in type(error).__name__


def of_a_client(error: Exception) -> bool:
    """Whether a storage's client raised it as an error of its own kind."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def explained(error: Exception, place: str) -> Exception:
    """`error`, or what a storage's client raised as an `OSError` of one line."""
    if not of_a_client(error) or isinstance(error, OSError):
        return error
    hint = ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if "Credentials" in type(error).__name__ else ""
    return StorageError(f"{place}: {in_short(error)}{hint}")


def in_short(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def make_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Makes a folder where a storage has such; a bucket is never made."""
    protocols = filesystem.protocol
    if not BUCKETS & set((protocols,) if isinstance(protocols, str) else protocols):
        filesystem.makedirs(path, exist_ok=True)
