"""Remote shards on this machine: whole copies in a folder of bounded size, from which those used longest ago go first.

The folder is `SHARD_CACHE` (by default one in the temporary folder), its size at most `SHARD_CACHE_GB` (by default 20): both
belong to a machine, not to a run. All processes of a machine share it. A file in it is named by its sha256.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.storage.retry import with_patience

DOWNLOADS = 3  # of a shard that does not come as it should be
ABANDONED = 3600.0  # seconds without a byte after which a copy that is not whole is nobody's any more


def bring(root: str, shard: Shard) -> Path:
    """A file on this machine with the shard's content: itself, or a copy in the cache, whose size and sha256 are right.

    Args:
        root: folder or fsspec URL of the shard.
        shard: as its manifest describes it.

    Raises:
        ShardError: it is missing, cannot be read, or is not what the manifest says; names it.
    """
    filesystem, folder = fsspec.url_to_fs(root)
    remote = f"{folder}/{shard.name}"
    try:
        if isinstance(filesystem, LocalFileSystem):
            os.stat(remote)
            return Path(remote)
        return cached(filesystem, remote, shard, root)
    except FileNotFoundError:
        raise ShardError(f"{shard.name}: missing; it is in the manifest but not in {root}") from None
    except OSError as error:
        raise ShardError(f"{shard.name}: not read from {root}: {error}") from None


def cached(filesystem: fsspec.AbstractFileSystem, remote: str, shard: Shard, root: str) -> Path:
    """The shard's copy in the cache, downloaded if it is not there; now the one used last."""
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
    """Copies a shard to `path` and checks it, some times if need be; raises `ShardError` where it is another one."""
    for _ in range(DOWNLOADS):
        with_patience(partial(filesystem.get_file, remote, str(path)), root)
        size = path.stat().st_size
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if (size, sha256) == (shard.bytes, shard.sha256):
            return
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "too long"
        raise ShardError(f"{shard.name}: {what}: {size} bytes; the manifest says {shard.bytes}")
    raise ShardError(f"{shard.name}: sha256 is {sha256}; the manifest says {shard.sha256}")


def cache_folder() -> Path:
    """Where this machine keeps copies."""
    return Path(os.environ.get("SHARD_CACHE") or Path(tempfile.gettempdir(), f"shard-cache-{os.getuid()}"))


def cache_limit() -> int:
    """How many bytes of them."""
    text = os.environ.get("SHARD_CACHE_GB") or "20"
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise ShardError(f"SHARD_CACHE_GB: a number of gigabytes is wanted, not {text!r}") from None


def make_room(folder: Path, size: int, limit: int) -> None:
    """Removes the copies that were used longest ago until `size` more bytes fit in; a process that has one open reads on."""
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
