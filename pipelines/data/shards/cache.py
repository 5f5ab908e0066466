"""Local copies of remote shards, in a folder of bounded size that all processes of a machine share.

The folder is `SHARD_CACHE` (by default one in the temporary folder), its size at most `SHARD_CACHE_GB` (by default 20): both
belong to a machine, not to a run. `<sha256>.tar` is a copy; while one is downloaded, there are `<sha256>.partial` and
`<sha256>.lock`, an empty file whose size is the room that the copy will take.

Locks (`flock`; a process that is killed loses them) keep order. The folder's own is held while room is counted, made and given.
A `.lock` file's is held by the process that downloads, so that each shard is downloaded once. A copy is locked, shared, by each
process that has it open: no copy that is open is deleted, and nothing that is deleted takes room.
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

DOWNLOADS = 3  # attempts at a shard whose copies are damaged
PATIENCE = 5.0  # seconds for which a process waits until others close their copies
ABANDONED = 3600.0  # seconds without a new byte after which a `.partial` file without a lock may be deleted


class NoRoomError(ShardError):
    """The cache has no room for a shard, because the copies in it are open or because the shard is larger than the cache."""


class Copy(NamedTuple):
    """A file with a shard's content, open for reading; it stays where it is until `descriptor` is closed."""

    path: Path
    descriptor: int


def local_copy(root: str, shard: Shard, patience: float | None = None) -> Path:
    """The path of a local file with the shard's content, brought here if need be; a copy may be deleted later."""
    copy = open_copy(root, shard, patience)
    os.close(copy.descriptor)
    return copy.path


def open_copy(root: str, shard: Shard, patience: float | None = None) -> Copy:
    """The shard itself or its checked copy in the cache, open for reading; the caller closes `descriptor`.

    Args:
        root: folder or fsspec URL of the shard.
        shard: its line of the manifest.
        patience: seconds to wait for other processes to close their copies if there is no room, by default `PATIENCE`. A process
            that has copies open itself must not wait: others may wait for it.

    Raises:
        NoRoomError: there is no room for a copy.
        ShardError: the shard is missing, cannot be read, or is not what the manifest says; the error names it.
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
    """A descriptor of the shard's copy at `path`, which is then the one used last; None if there is no whole copy."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if (
            is_at(path, descriptor) and status.st_size == shard.bytes
        ):  # a crash of the machine may have cut it
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # used, not changed
            return descriptor
        os.close(descriptor)
    return None


def bring(root: str, shard: Shard, path: Path, deadline: float) -> int:
    """Downloads the shard to `path`, unless another process does so meanwhile; returns a descriptor as `use` does."""
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
    """Copies a shard to `path`, again if the copy is damaged; raises `ShardError` after `DOWNLOADS` times."""
    filesystem, folder = file_system(root)
    for left in reversed(range(DOWNLOADS)):
        retry(partial(filesystem.get_file, f"{folder}/{shard.name}", str(path)), root)
        try:
            return shard.check(path)
        except ShardError:
            if not left:
                raise


# Room -----------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of this machine's copies."""
    return Path(os.environ.get("SHARD_CACHE") or Path(tempfile.gettempdir(), f"shard-cache-{os.getuid()}"))


def cache_limit() -> int:
    """The bytes that this machine's copies may take."""
    text = os.environ.get("SHARD_CACHE_GB") or "20"
    try:
        return round(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise ShardError(f"SHARD_CACHE_GB: a number of gigabytes is wanted, not {text!r}") from None


def reserve(folder: Path, shard: Shard, lock: IO[bytes], deadline: float) -> None:
    """Gives the shard its room, once other copies have left it; raises `NoRoomError` if they have not until `deadline`."""
    limit = cache_limit()
    while True:
        with alone(folder):
            if make_room(folder, shard.bytes, limit):
                os.ftruncate(lock.fileno(), shard.bytes)
                return
        if shard.bytes > limit or time.monotonic() >= deadline:
            raise NoRoomError(
                f"{shard.name}: no room for its {shard.bytes / 1e9:.3g} GB in {folder}, whose {limit / 1e9:.3g} GB are in use: "
                "set SHARD_CACHE_GB higher or data.shuffle_buffer lower"
            )
        time.sleep(0.02)


def make_room(folder: Path, size: int, limit: int) -> bool:
    """Deletes the least recently used copies that nobody has open until `size` more bytes fit; returns whether they do."""
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
            elif not path.with_suffix(".lock").exists():  # an older version of this project downloads without
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
    """Deletes a file that no process has locked; returns whether it did."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(path, file.fileno()):
            path.unlink()
            return True
    return False


def remove_abandoned(lock: Path) -> bool:
    """Deletes what a killed download has left, if nobody holds its lock; returns whether it did."""
    if not remove_unused(lock):
        return False
    lock.with_suffix(".partial").unlink(missing_ok=True)
    return True


# Locks ----------------------------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A block in which this process alone counts, makes and gives room."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """A block in which this process alone has a file, empty at first, at `path`; it is gone afterwards."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(path, file.fileno()):  # removed while this process waited
                continue
            os.ftruncate(file.fileno(), 0)  # of a process that was killed
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
