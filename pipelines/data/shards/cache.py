"""Local copies of remote shards, in a folder of bounded size; the least recently used go first.

The folder is `SHARD_CACHE` (by default one in the temporary folder), its size at most `SHARD_CACHE_GB` (by default 20): both
belong to a machine, not to a run. All processes of a machine share it. A file in it is named by its sha256.
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

import fsspec

from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.storage.files import file_system
from pipelines.storage.retry import is_remote, retry

DOWNLOADS = 3  # attempts at a shard whose copies are damaged
ABANDONED = 3600.0  # seconds without a new byte after which an unfinished copy may be deleted


def local_copy(root: str, shard: Shard) -> Path:
    """A local file with the shard's content: the shard itself, or its checked copy in the cache.

    Args:
        root: folder or fsspec URL of the shard.
        shard: its line of the manifest.

    Raises:
        ShardError: the shard is missing, cannot be read, or is not what the manifest says; the error names it.
    """
    filesystem, folder = file_system(root)
    remote = f"{folder}/{shard.name}"
    try:
        if not is_remote(root):
            os.stat(remote)
            return Path(remote)
        return cached(filesystem, remote, shard, root)
    except FileNotFoundError:
        raise ShardError(f"{shard.name}: missing; it is in the manifest but not in {root}") from None
    except OSError as error:
        raise ShardError(f"{shard.name}: not read from {root}: {error}") from None


def cached(filesystem: fsspec.AbstractFileSystem, remote: str, shard: Shard, root: str) -> Path:
    """The shard's copy in the cache, downloaded if it is not there, and marked as the one used last."""
    folder = cache_folder()
    path = folder / f"{shard.sha256}.tar"
    if use(path, shard):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial_copy = folder / f"{shard.sha256}.partial"
    with locked(partial_copy):
        if not use(path, shard):  # another process may have downloaded it meanwhile
            make_room(folder, shard.bytes, cache_limit())
            download(filesystem, remote, partial_copy, shard, root)
            with partial_copy.open("rb") as file:
                os.fsync(file.fileno())
            partial_copy.replace(path)
    return path


def use(path: Path, shard: Shard) -> bool:
    """Whether `path` is a whole copy of the shard, which is then marked as the one used last."""
    with suppress(FileNotFoundError):
        status = path.stat()
        if status.st_size == shard.bytes:  # a crash of the machine may have cut it
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # used, not changed
            return True
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block in which this process alone has a file at `path`; unless the block renames it, the file is gone afterwards.

    Loader processes want the same shards at the same time. A process that is killed loses the lock.
    """
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(path, file.fileno()):  # renamed or removed while this process waited
                continue
            os.utime(path)  # what a killed process left is not abandoned any more
            try:
                yield
            finally:
                if is_at(path, file.fileno()):
                    path.unlink()
            return


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def download(filesystem: fsspec.AbstractFileSystem, remote: str, path: Path, shard: Shard, root: str) -> None:
    """Copies a shard to `path`, again if the copy is damaged; raises `ShardError` after `DOWNLOADS` times."""
    for left in reversed(range(DOWNLOADS)):
        retry(partial(filesystem.get_file, remote, str(path)), root)
        try:
            return shard.check(path)
        except ShardError:
            if not left:
                raise


def cache_folder() -> Path:
    """The folder of this machine's copies."""
    return Path(os.environ.get("SHARD_CACHE") or Path(tempfile.gettempdir(), f"shard-cache-{os.getuid()}"))


def cache_limit() -> int:
    """The bytes that this machine's copies may take."""
    text = os.environ.get("SHARD_CACHE_GB") or "20"
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise ShardError(f"SHARD_CACHE_GB: a number of gigabytes is wanted, not {text!r}") from None


def make_room(folder: Path, size: int, limit: int) -> None:
    """Deletes the least recently used copies until `size` more bytes fit; open files can be read on."""
    files: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process makes room, too
            found = path.stat()
            files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = size + sum(bytes_ for _, bytes_, _ in files)
    for used, bytes_, path in sorted(files):
        if total <= limit:
            return
        if path.suffix == ".tar" or used < time.time() - ABANDONED:
            path.unlink(missing_ok=True)
            total -= bytes_
