"""Files at a path or any fsspec URL: written atomically, read, hashed, parsed as JSON.

A local file is written under a temporary name beside the final one, synced to the disk, and then renamed. So
neither a killed process nor a crash of the machine leaves a partial file. An object store gets each file in
one put. Calls to a remote storage are retried on transient errors; see `retry`.
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
# Errors of os.link on file systems without hard links
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def file_system(place: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of a path or URL, without cached listings, and the path in it."""
    filesystem, path = fsspec.url_to_fs(str(place), use_listings_cache=False)
    return filesystem, path.rstrip("/")


def make_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Creates a folder on a storage that has folders. Does nothing on object stores."""
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    if BUCKETS & protocols:
        return
    here = (Path(path), *Path(path).parents) if "file" in protocols else ()
    new = [folder for folder in here if not folder.exists()]
    filesystem.makedirs(path, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def rename(path: Path, target: str | Path) -> None:
    """Syncs a local file to the disk, then renames it to `target`: no crash leaves a partial `target`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.replace(target)
    sync_folder(Path(target).parent)


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a local folder to the disk."""
    with suppress(OSError):  # some file systems cannot sync folders, and some folders are not readable
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def staged(place: str | Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there becomes `place` when the block ends.

    If the block raises an error, the temporary file is deleted.

    Raises:
        StorageError: the file cannot be written; its `errno` is that of the cause.
        FileNotFoundError: the block raises it, or the bucket does not exist.
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
    except FileNotFoundError:  # a source that the block copies from is missing, or the bucket
        raise
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"{place}: no space left on the device; nothing of it was kept", error.errno
            ) from None
        raise StorageError(f"{place}: not written: {one_line(error)}", error.errno) from None


@retried
def write(place: str | Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        OSError: the storage refuses; an existing file is left unchanged.
    """
    if not is_remote(place):
        with staged(place) as path:
            path.write_bytes(content)
        return
    filesystem, target = file_system(place)
    try:
        make_folder(filesystem, str(PurePosixPath(target).parent))
        filesystem.pipe_file(target, content)
    except FileNotFoundError as error:  # the bucket is missing; the storage's own error does not name it
        raise FileNotFoundError(f"{place}: {one_line(error)}") from None


@retried
def create(place: str | Path, content: bytes) -> bool:
    """Writes a file unless it exists; returns True if the file then has exactly this content.

    If several processes create the same file at the same time, only one gets True. This holds for local files
    and for storages with a conditional put (S3, GCS). On other storages each of them may get True, and the
    last one's file stays.

    Args:
        place: path or URL of the file.
        content: must be unique to this process. If the storage's answer was lost and the put is retried, the
            content tells the file of this process from another's.
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
    """Creates a local file atomically with its content; raises `FileExistsError` if the file exists.

    The content is written to a temporary file, to which `target` becomes a hard link: `os.link` fails if
    `target` exists. On file systems without hard links, `target` is written directly, and a reader may find
    it incomplete.
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
    """Puts an object; raises `FileExistsError` if it exists."""
    try:
        filesystem.pipe_file(target, content, mode="create")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        if filesystem.exists(target):  # ENOSYS: the store has no conditional put
            raise FileExistsError(target) from None
        filesystem.pipe_file(target, content)


@retried
def read(place: str | Path, start: int | None = None, end: int | None = None) -> bytes:
    """The content of a file, or its bytes [start, end)."""
    filesystem, path = file_system(place)
    return filesystem.cat_file(path, start=start, end=end)


def write_json(place: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; see `write`."""
    write(place, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def read_json(place: str | Path) -> Any:
    """The value of a JSON file; `None` if the file does not exist.

    Raises:
        DamagedFileError: the file is not JSON.
    """
    try:
        return json.loads(read(place))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DamagedFileError(f"{place}: not JSON ({one_line(error)}): run again what writes it") from None


def required_json(place: str | Path) -> Any:
    """The value of a JSON file, as `read_json`; raises `FileNotFoundError` if the file does not exist."""
    value = read_json(place)
    if value is None:
        raise FileNotFoundError(f"{place}: missing: run what writes it")
    return value


def read_record(place: str | Path, kind: type[T]) -> T | None:
    """The value of a JSON file that this project writes for itself and can do without.

    Returns `None` if the file does not exist. If it is not JSON or not a `kind`, as after a crash, logs a
    warning and returns `None` too.
    """
    try:
        value = read_json(place)
        if value is None or isinstance(value, kind):
            return value
    except DamagedFileError:
        pass  # told below, as is JSON of another kind
    log.warning("%s: unreadable, as a crash leaves a file; taken as not there", place)
    return None


@retried
def names_in(place: str | Path) -> list[str]:
    """Names of the files and folders in a folder; empty if the folder does not exist."""
    filesystem, path = file_system(place)
    return (
        [PurePosixPath(inner).name for inner in filesystem.ls(path, detail=False)]
        if filesystem.exists(path)
        else []
    )


@retried
def remove(place: str | Path) -> None:
    """Deletes a file, or a folder with its content, if it exists."""
    filesystem, path = file_system(place)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The digest of a local file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def combined_sha256(parts: Mapping[str, str]) -> str:
    """One sha256 over named digests; the order of `parts` does not matter."""
    lines = (f"{name}\0{value}\n" for name, value in sorted(parts.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
