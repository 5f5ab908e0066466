"""Files copied between this machine and a storage that all machines see.

Whoever may write to the storage may have changed what lies there. So names that come from it never lead out of a folder, and
`fetch` takes a file only if it has the bytes and the sha256 that are known of it.
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

LONGEST_NAME, LONGEST_PART = 1024, 255  # bytes of a name, and of each of its parts
BLOCK = 8 * 2**20  # bytes that are read at once


@dataclass(frozen=True)
class File:
    """A file of a folder. Raises `StorageError` if it has no valid name, size or digest.

    Attributes:
        name: its path in the folder, with `/` between the parts; see `check_name`.
        bytes: its size.
        sha256: of its content, in hexadecimal.
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
    """Files of a local folder that belong at a place in the storage.

    Attributes:
        folder: of the files; they are not read if they are at `url` already.
        url: a place that only ever has this content, such as one named by its digest.
        names: of the files; the last one is written last and marks the others as complete.
        sizes: bytes of those files whose size is known.
    """

    folder: str
    url: str
    names: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `StorageError` unless all files are here, or at `url` already. Uploads nothing."""
        try:
            _check_here(self.folder, self.url, self.names, self.sizes)
        except StorageError:
            if not exists(f"{self.url}/{self.names[-1]}"):
                raise

    def run(self) -> str:
        """`publish`es the files and returns `url`."""
        return publish(self.folder, self.url, self.names)


def publish(folder: str | Path, url: str, names: Iterable[str]) -> str:
    """Copies the files `names` of a local folder to `url`, unless they are there, and returns `url`; see `Upload`.

    Raises:
        StorageError: a file is neither here nor there (then none is copied), or the storage does not exist.
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
    """Raises `StorageError` unless the folder has all of the files, in these sizes."""
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
    """Whether there is a file or folder at a path or URL."""
    filesystem, path = file_system(place)
    return filesystem.exists(path)


def describe(folder: str | Path, name: str) -> File:
    """The file `name` of a local folder."""
    path = Path(folder, name)
    return File(name, path.stat().st_size, file_digest(path))


def check_name(name: str) -> str:
    """Returns the name of a file in a folder; raises `StorageError` if it may lead out of it or does not suit every system.

    Its parts are separated by `/`. None is empty, `.`, `..` or hidden (git, DVC and shells take orders from hidden files),
    all characters are printable, and no part is longer than 255 bytes.
    """
    parts = name.split("/")
    if not name.isprintable() or "\\" in name:
        raise StorageError(f"the name {_shown(name)} has characters that no name of a file may have here")
    if any(part.startswith(".") or not part for part in parts):
        raise StorageError(f"the name {_shown(name)} is absolute, hidden or leads out of its folder")
    if len(name.encode()) > LONGEST_NAME or max(len(part.encode()) for part in parts) > LONGEST_PART:
        raise StorageError(
            f"the name {_shown(name)} is too long: {LONGEST_NAME} bytes are allowed, {LONGEST_PART} in each part"
        )
    return name


def check_names(names: Collection[str]) -> None:
    """Raises `StorageError` unless all names suit (see `check_name`) and can lie in one folder together."""
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
    """A name in quotes, cut to 80 characters."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def pull(url: str, folder: Path, names: Iterable[str]) -> None:
    """Copies the files `names` at `url` to a local folder, each whole or not at all. See `fetch` if their content is known.

    Raises:
        FileNotFoundError: a file is not there.
        StorageError: a name leads out of the folder.
    """
    filesystem, root = file_system(url)
    for name in map(check_name, names):
        with staged(folder / name) as path:
            retry(partial(filesystem.get_file, f"{root}/{name}", str(path)), url)


def fetch(url: str, folder: Path, files: Collection[File], below: str = "") -> None:
    """Copies `files` at `url` to a local folder, which it makes; each is exactly what its description says.

    Args:
        url: of a folder. There may be links on the way to it, but none in it.
        folder: gets the files by their names.
        files: what is known of them.
        below: where in `url` their names begin; empty, or a path that ends with `/`.

    Raises:
        StorageError: two names do not go together, there is no room for all files, or a file is missing, not an ordinary file,
            or of other bytes.
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
    """Copies the file `name` at `url`, no more of it than `file.bytes`; raises `StorageError` if it is not `file`."""
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
    """Bytes of the file `name` at `url`; raises `StorageError` if it is missing, no ordinary file, or behind a link."""
    filesystem, root = file_system(url)
    try:
        found = filesystem.info(f"{root}/{name}")
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{url}/{name}: there is no such file") from None
    own = f"{os.path.realpath(root)}/{name}"  # where it is, unless there is a link below `root`
    behind_link = isinstance(filesystem, LocalFileSystem) and os.path.realpath(f"{root}/{name}") != own
    if found["type"] != "file" or behind_link:
        raise StorageError(f"{url}/{name}: is a link, a folder or a special file, not an ordinary one")
    return found["size"]


@retried
def read_at_most(url: str, name: str, limit: int) -> bytes:
    """The content of the file `name` at `url`; raises `StorageError` as `size_of`, and if it has more than `limit` bytes."""
    size = size_of(url, name)
    if size > limit:
        raise StorageError(f"{url}/{name}: has {size} bytes; at most {limit} are read")
    filesystem, path = file_system(f"{url}/{name}")
    with filesystem.open(path, "rb", block_size=BLOCK) as file:
        return file.read(size)
