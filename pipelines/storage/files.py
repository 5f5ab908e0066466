"""Files at a path or any fsspec URL: written whole or not at all, read, hashed, as JSON.

A file on this machine is written under a temporary name beside its own, synced to the disk, and then renamed, so that neither a
killed process nor a crash of the machine leaves a part of it; an object store gets it in one put.
A remote storage that fails for a while is tried again; see `retry`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec

from pipelines.storage.errors import DamagedFileError, StorageError, one_line
from pipelines.storage.retry import FULL, is_remote, retried, retry

log = logging.getLogger(__name__)
T = TypeVar("T")

BUCKETS = {"abfs", "abfss", "az", "gcs", "gs", "s3", "s3a"}  # have no folders
NO_LINKS = {
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
}  # of hard links


def file_system(place: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, which caches no listings, and the path on it."""
    filesystem, path = fsspec.url_to_fs(str(place), use_listings_cache=False)
    return filesystem, path.rstrip("/")


def make_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Makes a folder on a storage that has folders; never makes a bucket."""
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    if BUCKETS & protocols:
        return
    here = (Path(path), *Path(path).parents) if "file" in protocols else ()
    new = [folder for folder in here if not folder.exists()]
    filesystem.makedirs(path, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def rename(path: Path, target: str | Path) -> None:
    """Gives a written file of this machine its final name; no crash leaves a part of it under that name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.replace(target)
    sync_folder(Path(target).parent)


def sync_folder(folder: Path) -> None:
    """Returns once the names of the files in a folder of this machine are on its disk."""
    with suppress(OSError):  # some file systems sync files alone, and a folder may be one to write to only
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def staged(place: str | Path) -> Iterator[Path]:
    """Gives a temporary path, whose file becomes `place` when the block ends, and is deleted on an error.

    Raises:
        StorageError: the file cannot be written, with the `errno` of the cause.
    """
    filesystem, target = file_system(place)
    folder = str(PurePosixPath(target).parent)
    try:
        if is_remote(place):
            with tempfile.TemporaryDirectory() as here:
                yield (path := Path(here, PurePosixPath(target).name))
                make_folder(filesystem, folder)
                retry(partial(filesystem.put_file, str(path), target), place)
            return
        make_folder(filesystem, folder)
        path = Path(folder, f".{PurePosixPath(target).name}.{uuid.uuid4().hex}.tmp")
        try:
            yield path
            rename(path, target)
        finally:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # of what is copied to `place`, or of a bucket
        raise
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"{place}: no space left on the device; nothing of it was kept", error.errno
            ) from None
        raise StorageError(f"{place}: not written: {one_line(error)}", error.errno) from None


@retried
def write(place: str | Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all.

    Raises:
        OSError: the storage refuses; an older file is left as it was.
    """
    if not is_remote(place):
        with staged(place) as path:
            path.write_bytes(content)
        return
    filesystem, target = file_system(place)
    try:
        make_folder(filesystem, str(PurePosixPath(target).parent))
        filesystem.pipe_file(target, content)
    except FileNotFoundError as error:  # of a missing bucket, which the storage does not name
        raise FileNotFoundError(f"{place}: {one_line(error)}") from None


@retried
def create(place: str | Path, content: bytes) -> bool:
    """Writes a file unless there is one of that name; returns whether the file is there with this very content.

    Of several processes that create the same file at the same time, one gets True, on this machine and on storages that can put
    an object on the condition that there is none (S3, GCS). On others each may get True, the last one for good.

    Args:
        place: of the file.
        content: which nobody else would write: an answer that was lost is told from another's file by it.
    """
    filesystem, target = file_system(place)
    make_folder(filesystem, str(PurePosixPath(target).parent))
    try:
        if is_remote(place):
            _put_new(filesystem, target, content)
            return filesystem.cat_file(target) == content
        _create_whole(Path(target), content)
    except FileExistsError:
        return filesystem.cat_file(target) == content
    return True


def _create_whole(target: Path, content: bytes) -> None:
    """Creates a local file with its content at once, so that nobody reads a part; raises `FileExistsError` if there is one.

    A hard link is made only where there is no file. On filesystems without hard links, a reader may find the file still empty.
    """
    whole = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_new(whole, content)
        os.link(whole, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _write_new(target, content)
    finally:
        whole.unlink(missing_ok=True)
    sync_folder(target.parent)


def _write_new(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put_new(filesystem: fsspec.AbstractFileSystem, target: str, content: bytes) -> None:
    """Puts an object; raises `FileExistsError` if there is one."""
    try:
        filesystem.pipe_file(target, content, mode="create")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        if filesystem.exists(target):  # a store without the condition, which answers "not implemented"
            raise FileExistsError(target) from None
        filesystem.pipe_file(target, content)


@retried
def read(place: str | Path, start: int | None = None, end: int | None = None) -> bytes:
    """The content of a file, or its bytes in [start, end)."""
    filesystem, path = file_system(place)
    return filesystem.cat_file(path, start=start, end=end)


def write_json(place: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all; see `write`."""
    write(place, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def read_json(place: str | Path) -> Any:
    """The value of a JSON file; None if there is no such file.

    Raises:
        DamagedFileError: it is not JSON; a `ValueError`.
    """
    try:
        return json.loads(read(place))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DamagedFileError(f"{place}: not JSON ({one_line(error)}): run again what writes it") from None


def required_json(place: str | Path) -> Any:
    """The value of a JSON file, as `read_json`; raises `FileNotFoundError` if there is no such file."""
    value = read_json(place)
    if value is None:
        raise FileNotFoundError(f"{place}: missing: run what writes it")
    return value


def read_record(place: str | Path, kind: type[T]) -> T | None:
    """The value of a JSON file that this project keeps for itself and can do without.

    None if there is no such file, and, with a line in the log, if a crash has left something else than a `kind` there.
    """
    try:
        value = read_json(place)
        if value is None or isinstance(value, kind):
            return value
    except DamagedFileError:
        pass
    log.warning("%s: unreadable, as a crash leaves a file; taken as not there", place)
    return None


@retried
def names_in(place: str | Path) -> list[str]:
    """Names of the files and folders in a folder; none if that does not exist."""
    filesystem, path = file_system(place)
    return (
        [PurePosixPath(inner).name for inner in filesystem.ls(path, detail=False)]
        if filesystem.exists(path)
        else []
    )


@retried
def remove(place: str | Path) -> None:
    """Deletes a folder and all that is in it, or a file, if it is there."""
    filesystem, path = file_system(place)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The digest of a local file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def combined_sha256(parts: Mapping[str, str]) -> str:
    """One sha256 of named digests, whatever their order."""
    lines = (f"{name}\0{value}\n" for name, value in sorted(parts.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
