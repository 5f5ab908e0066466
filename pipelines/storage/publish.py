"""Copies files between this machine and a storage that all machines share.

The storage is not trusted, because others may write to it. So file names that come from it are checked not to
lead out of their folder, and `fetch` accepts a file only if it has the expected size and sha256.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from fsspec.implementations.local import LocalFileSystem

from pipelines.storage.errors import StorageError, one_line
from pipelines.storage.files import file_digest, file_system, make_folder, staged
from pipelines.storage.retry import is_remote, retried, retry

LONGEST_NAME, LONGEST_PART = 1024, 255  # bytes in a name, and in each part between slashes
BLOCK = 8 * 2**20  # bytes per read


@dataclass(frozen=True)
class File:
    """Description of a file in a folder. Raises `StorageError` if name, size or digest is invalid.

    Attributes:
        name: path of the file in the folder, with `/` between the parts; see `check_name`.
        bytes: size of the file.
        sha256: digest of its content, in hexadecimal.
    """

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_name(self.name)
        if type(self.bytes) is not int or self.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise StorageError(
                f"{_shown(self.name)}: {self.bytes!r:.40} and {self.sha256!r:.80} are no size and no sha256"
            )


@dataclass(frozen=True)
class Upload:
    """Files of a local folder that are to be uploaded to a place in the storage.

    Attributes:
        folder: local folder of the files. It is not read if the files are at `url` already.
        url: destination. Its content never changes, for example because its name has the content's digest.
        names: names of the files. The last one is uploaded last, and marks the upload as complete.
        sizes: bytes of those files whose size is known.
    """

    folder: str
    url: str
    names: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `StorageError` unless all files are in `folder`, or at `url` already. Uploads nothing."""
        try:
            _check_here(self.folder, self.url, self.names, self.sizes)
        except StorageError:
            if not exists(f"{self.url}/{self.names[-1]}"):
                raise

    def run(self) -> str:
        """`publish`es the files and returns `url`."""
        return publish(self.folder, self.url, self.names)


def publish(folder: str | Path, url: str, names: Iterable[str]) -> str:
    """Copies the files `names` of a local folder to `url` unless they are there; returns `url`.

    The last file is written last and marks the upload as complete; see `Upload`.

    Raises:
        StorageError: a file is missing and the files are not at `url` (then none is copied), or the storage
            does not exist.
        OSError: the storage refuses the files.
    """
    filesystem, root = file_system(url)
    *others, marker = names
    try:
        if exists(f"{url}/{marker}"):
            return url
        _check_here(folder, url, (*others, marker))
        for name in (*others, marker):
            if is_remote(url):
                make_folder(filesystem, str(PurePosixPath(root, name).parent))
                retry(partial(filesystem.put_file, str(Path(folder, name)), f"{root}/{name}"), url)
            else:
                with staged(f"{root}/{name}") as path:
                    shutil.copyfile(Path(folder, name), path)
    except FileNotFoundError as error:
        raise StorageError(f"{folder} cannot be put to {url}: {one_line(error)}") from None
    return url


def _check_here(
    folder: str | Path, url: str, names: Iterable[str], sizes: Mapping[str, int] | None = None
) -> None:
    """Raises `StorageError` unless the folder has all files, with the given sizes."""
    for name in names:
        path = Path(folder, name)
        if not path.is_file():
            raise StorageError(f"{folder} cannot be put to {url}: {path}: there is no such file")
        wanted = (sizes or {}).get(name)
        if wanted is not None and path.stat().st_size != wanted:
            raise StorageError(
                f"{folder} cannot be put to {url}: {path}: has {path.stat().st_size} bytes, not {wanted}"
            )


@retried
def exists(place: str | Path) -> bool:
    """Returns True if there is a file or folder at a path or URL."""
    filesystem, path = file_system(place)
    return filesystem.exists(path)


def describe(folder: str | Path, name: str) -> File:
    """The description of the file `name` in a local folder."""
    path = Path(folder, name)
    return File(name, path.stat().st_size, file_digest(path))


def check_name(name: str) -> str:
    """Returns `name`; raises `StorageError` unless it is a safe and portable path of a file in a folder.

    The parts of the path are separated by `/`. No part may be empty, `.` or `..`, hidden, or longer than 255
    bytes. Hidden files are refused because git, DVC and shells obey some of them. All characters must be
    printable, without backslashes, and the path may have at most 1024 bytes.
    """
    parts = name.split("/")
    if not name.isprintable() or "\\" in name:
        raise StorageError(f"the name {_shown(name)} has characters that no name of a file may have here")
    if any(part.startswith(".") or not part for part in parts):
        raise StorageError(f"the name {_shown(name)} is absolute, hidden or leads out of its folder")
    if len(name.encode()) > LONGEST_NAME or max(len(part.encode()) for part in parts) > LONGEST_PART:
        raise StorageError(
            f"the name {_shown(name)} is too long: "
            f"{LONGEST_NAME} bytes are allowed, {LONGEST_PART} in each part"
        )
    return name


def check_names(names: Collection[str]) -> None:
    """Raises `StorageError` unless all names are valid (see `check_name`) and can coexist in one folder."""
    taken: set[str] = set()
    for name in names:
        if check_name(name) in taken:
            raise StorageError(f"the name {_shown(name)} is there twice")
        taken.add(name)
    for name in names:
        for parent in map(str, PurePosixPath(name).parents):
            if parent in taken:
                raise StorageError(f"the name {_shown(parent)} is that of a file and that of a folder")


def _shown(name: str) -> str:
    """A name in ASCII and quotes, cut to 80 characters."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def pull(url: str, folder: Path, names: Iterable[str]) -> None:
    """Copies the files `names` at `url` to a local folder, each atomically.

    If their sizes and digests are known, use `fetch`.

    Raises:
        FileNotFoundError: a file does not exist.
        StorageError: a name leads out of the folder.
    """
    filesystem, root = file_system(url)
    for name in map(check_name, names):
        with staged(folder / name) as path:
            retry(partial(filesystem.get_file, f"{root}/{name}", str(path)), url)


def fetch(url: str, folder: Path, files: Collection[File], below: str = "") -> None:
    """Copies `files` at `url` to a local folder, and checks their sizes and digests.

    Args:
        url: folder in the storage. The path to it may have links; the path below it must not.
        folder: local destination, created if needed.
        files: descriptions of the files.
        below: prefix of the files' names in `url`: empty, or a path that ends with `/`.

    Raises:
        StorageError: two names conflict, the disk has no room for all files, or a file is missing, not an
            ordinary file, or has another size or content.
    """
    check_names([file.name for file in files])
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.bytes for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(f"{url}: its files have {needed} bytes, and there is room for {free} here")
    for file in files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        retry(partial(_fetch, url, f"{below}{file.name}", file, target), url)


def _fetch(url: str, name: str, file: File, target: Path) -> None:
    """Copies the file `name` at `url`, reading at most `file.bytes`; raises `StorageError` if it differs."""
    size = size_of(url, name)
    if size != file.bytes:
        raise StorageError(f"{url}/{name}: has {size} bytes, not {file.bytes}")
    filesystem, source = file_system(f"{url}/{name}")
    content, left = hashlib.sha256(), file.bytes
    with filesystem.open(source, "rb", block_size=BLOCK) as remote, target.open("wb") as local:
        while left and (block := remote.read(min(BLOCK, left))):
            content.update(block)
            local.write(block)
            left -= len(block)
    if left or content.hexdigest() != file.sha256:
        raise StorageError(f"{url}/{name}: its content is not what was written there (sha256)")


def size_of(url: str, name: str) -> int:
    """Size in bytes of the file `name` at `url`.

    Raises:
        StorageError: the file is missing, not an ordinary file, or behind a link below `url`.
    """
    filesystem, root = file_system(url)
    try:
        found = filesystem.info(f"{root}/{name}")
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{url}/{name}: there is no such file") from None
    own = f"{os.path.realpath(root)}/{name}"  # the file's real path if there is no link below `root`
    behind_link = isinstance(filesystem, LocalFileSystem) and os.path.realpath(f"{root}/{name}") != own
    if found["type"] != "file" or behind_link:
        raise StorageError(f"{url}/{name}: is a link, a folder or a special file, not an ordinary one")
    return found["size"]


@retried
def read_at_most(url: str, name: str, limit: int) -> bytes:
    """The content of the file `name` at `url`.

    Raises:
        StorageError: as `size_of`, and if the file has more than `limit` bytes.
    """
    size = size_of(url, name)
    if size > limit:
        raise StorageError(f"{url}/{name}: has {size} bytes; at most {limit} are read")
    filesystem, path = file_system(f"{url}/{name}")
    with filesystem.open(path, "rb", block_size=BLOCK) as file:
        return file.read(size)
