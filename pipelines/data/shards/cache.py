"""Local copies of remote shards, in a folder of bounded size that all processes of a machine share.

Two environment variables describe the cache, because it belongs to a machine and not to a run: its folder
`SHARD_CACHE` (default: a folder in the temporary directory) and its size `SHARD_CACHE_GB` (default: 20).

    <sha256>.tar      a complete copy
    <sha256>.partial  a copy that is being downloaded
    <sha256>.lock     exists during a download; a sparse file whose size is the room reserved for the copy

Processes synchronise by `flock`, and the kernel releases the locks of a process that is killed. A process
locks the folder while it counts, frees or reserves room. It locks `<sha256>.lock` while it downloads, so each
shard is downloaded once. It holds a shared lock on each copy that it has open. An open copy is never deleted,
because a file that is deleted while open still takes room on the disk.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.storage.files import file_system
from pipelines.storage.retry import is_remote, retry

DOWNLOADS = 3  # attempts to download a shard whose copy is damaged
PATIENCE = 5.0  # seconds to wait for other processes to close their copies
ABANDONED = 3600.0  # seconds without access after which a `.partial` file without `.lock` is deleted


class NoRoomError(ShardError):
    """The cache has no room for a shard: its copies are open, or the shard is larger than the cache."""


class Copy(NamedTuple):
    """A file with a shard's content, open for reading. The cache keeps it until `descriptor` is closed."""

    path: Path
    descriptor: int


def local_copy(root: str, shard: Shard, patience: float | None = None) -> Path:
    """Path of a local file with the shard's content, downloaded if needed. The cache may delete it later."""
    copy = open_copy(root, shard, patience)
    os.close(copy.descriptor)
    return copy.path


def open_copy(root: str, shard: Shard, patience: float | None = None) -> Copy:
    """Opens the shard, or its checked copy in the cache. The caller closes `descriptor`.

    Args:
        root: folder or fsspec URL of the shard.
        shard: the shard's entry in the manifest.
        patience: seconds to wait for other processes to close their copies if there is no room. `None` means
            `PATIENCE`. A process that has copies open must pass 0, because other processes may wait for it.

    Raises:
        NoRoomError: there is no room for a copy.
        ShardError: the shard is missing, cannot be read, or does not match the manifest. The error names it.
    """
    try:
        if not is_remote(root):
            path = Path(file_system(root)[1], shard.name)
            return Copy(path, os.open(path, os.O_RDONLY))
        path = cache_folder() / f"{shard.sha256}.tar"
        descriptor = use(path, shard)
        if descriptor is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + (PATIENCE if patience is None else patience)
            descriptor = bring(root, shard, path, deadline)
        return Copy(path, descriptor)
    except FileNotFoundError:
        raise ShardError(f"{shard.name}: missing; it is in the manifest but not in {root}") from None
    except OSError as error:
        raise ShardError(f"{shard.name}: not read from {root}: {error}") from None


def use(path: Path, shard: Shard) -> int | None:
    """Opens the copy at `path` and marks it as just used; `None` if there is no complete copy."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        # The size is compared because a crash of the machine can truncate the copy.
        if is_at(path, descriptor) and status.st_size == shard.bytes:
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # atime = now; mtime stays
            return descriptor
        os.close(descriptor)
    return None


def bring(root: str, shard: Shard, path: Path, deadline: float) -> int:
    """Downloads the shard to `path` unless another process just did; returns a descriptor like `use`."""
    with locked(path.with_suffix(".lock")) as lock:
        descriptor = use(path, shard)
        if descriptor is not None:
            return descriptor
        reserve(path.parent, shard, lock, deadline)
        part = path.with_suffix(".partial")
        try:
            download(root, shard, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            with alone(path.parent):
                descriptor = os.open(part, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                part.replace(path)
                os.ftruncate(lock.fileno(), 0)
            return descriptor
        finally:
            part.unlink(missing_ok=True)


def download(root: str, shard: Shard, path: Path) -> None:
    """Copies a shard to `path`; raises `ShardError` if all of `DOWNLOADS` attempts give damaged copies."""
    filesystem, folder = file_system(root)
    for left in reversed(range(DOWNLOADS)):
        retry(partial(filesystem.get_file, f"{folder}/{shard.name}", str(path)), root)
        try:
            return shard.check(path)
        except ShardError:
            if not left:
                raise


# Room -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Folder of this machine's copies (`SHARD_CACHE`)."""
    return Path(os.environ.get("SHARD_CACHE") or Path(tempfile.gettempdir(), f"shard-cache-{os.getuid()}"))


def cache_limit() -> int:
    """Largest total size of this machine's copies in bytes (`SHARD_CACHE_GB`)."""
    text = os.environ.get("SHARD_CACHE_GB") or "20"
    try:
        return round(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise ShardError(f"SHARD_CACHE_GB: a number of gigabytes is wanted, not {text!r}") from None


def reserve(folder: Path, shard: Shard, lock: IO[bytes], deadline: float) -> None:
    """Reserves room for the shard.

    Raises:
        NoRoomError: the shard is larger than the cache, or too few copies are closed before `deadline`.
    """
    limit = cache_limit()
    while True:
        with alone(folder):
            if make_room(folder, shard.bytes, limit):
                os.ftruncate(lock.fileno(), shard.bytes)
                return
        if shard.bytes > limit or time.monotonic() >= deadline:
            raise NoRoomError(
                f"{shard.name}: no room for its {shard.bytes / 1e9:.3g} GB in {folder}, "
                f"whose {limit / 1e9:.3g} GB are in use: "
                "set SHARD_CACHE_GB higher or data.shuffle_buffer lower"
            )
        time.sleep(0.02)


def make_room(folder: Path, size: int, limit: int) -> bool:
    """Deletes the least recently used closed copies until `size` bytes fit; returns True if they fit."""
    total, copies = size, []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found = path.stat()
            last = max(found.st_atime, found.st_mtime)
            if path.suffix == ".lock":
                total += 0 if remove_abandoned(path) else found.st_size
            elif path.suffix == ".tar":
                total += found.st_size
                copies.append((last, found.st_size, path))
            elif not path.with_suffix(".lock").exists():  # older versions of this project make no lock
                if last < time.time() - ABANDONED:
                    path.unlink()
                else:
                    total += found.st_size
    for _, bytes_, path in sorted(copies):
        if total <= limit or size > limit:
            break
        total -= bytes_ if remove_unused(path) else 0
    return total <= limit


def remove_unused(path: Path) -> bool:
    """Deletes a file unless a process has locked it; returns True if the file was deleted."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(path, file.fileno()):
            path.unlink()
            return True
    return False


def remove_abandoned(lock: Path) -> bool:
    """Deletes the files of a killed download, whose lock nobody holds; returns True if they were deleted."""
    if not remove_unused(lock):
        return False
    lock.with_suffix(".partial").unlink(missing_ok=True)
    return True


# Locks ------------------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context in which no other process of the machine counts, frees or reserves room."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Context in which this process alone holds the file at `path`, empty at first, deleted at the end."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(path, file.fileno()):  # deleted while this process waited for the lock
                continue
            os.ftruncate(file.fileno(), 0)  # drops the reservation of a killed process
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


def is_at(path: Path, descriptor: int) -> bool:
    """Returns True if `path` still names the open file (others may delete or replace it)."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
