"""Local copies of remote shards, in a folder of bounded size; the least recently used go first.

The folder is `SHARD_CACHE` (by default one in the temporary folder), its size at most `SHARD_CACHE_GB` (by default 20): both
belong to a machine, not to a run. All processes of a machine share it. A file in it is named by its sha256.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import fsspec

from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.storage.files import file_system, staged
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
    with suppress(FileNotFoundError):
        status = path.stat()
        if status.st_size == shard.bytes:  # a crash of the machine may have cut it
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # used, not changed
            return path
    folder.mkdir(parents=True, exist_ok=True)
    make_room(folder, shard.bytes, cache_limit())
    with staged(path) as copy:
        download(filesystem, remote, copy, shard, root)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    return path


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
