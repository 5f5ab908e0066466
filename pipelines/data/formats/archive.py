"""Lists and reads the files of a data set, in a folder or an archive, by their path in it.

`Contents` lists each entry of the folder or archive as a file, as a folder, or as unusable with a reason. So
a source that takes samples from it can count the entries that it leaves out.
"""

from __future__ import annotations

import errno
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.data.formats.left_out import LeftOut
from pipelines.data.shards.sample import DataError
from pipelines.errors import UserError
from pipelines.storage import files
from pipelines.storage.errors import one_line

WHOLE_FILE = -1  # as `offset`: the member is a whole file, not a part of an archive
UNKNOWN = -1  # as `size`: the storage does not tell the member's size

# Reasons why an entry is unusable
HIDDEN = "hidden files and by-products of operating systems"
REPLACED = "entries that a later one of the same name replaces"
NOTHING = "links to nothing"
CIRCLE = "links in a circle"
OUTSIDE = "links that lead out of the archive"
SPECIAL = "entries that are neither files nor folders"
UNREADABLE = "files that may not be read"
LINKS = (NOTHING, CIRCLE, OUTSIDE)

_BY_PRODUCTS = ("__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN")
# Unicode categories: control characters, surrogates (undecoded bytes), line and paragraph separators
_NOT_TEXT = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a data set: `size` bytes at `offset` of the file `place`, or the file `place` itself."""

    place: str
    offset: int
    size: int


class Ref(NamedTuple):
    """Location of one sample: `size` bytes at `offset` of the file `name`.

    The sample is the whole file if `offset` is `WHOLE_FILE`. `path` is the path of an image in its data set,
    or empty.
    """

    key: str
    name: str
    offset: int
    size: int
    label: int | None = None
    path: str = ""


@dataclass(frozen=True)
class Contents:
    """The entries of a folder or archive, by their path in it: printable text with `/` between parts.

    Attributes:
        files: location of each file.
        folders: folders with an entry of their own. (An archive need not list the folders of its files.)
        unusable: (path, reason) of each other entry, for example a link to nothing.
    """

    files: dict[str, Member]
    folders: frozenset[str]
    unusable: tuple[tuple[str, str], ...] = ()

    def left_out(self) -> LeftOut:
        """A new `LeftOut` that counts the unusable entries."""
        left_out = LeftOut()
        for path, reason in self.unusable:
            left_out.add(reason, path)
        return left_out


class Listing:
    """Collects the entries of a folder or archive."""

    def __init__(self) -> None:
        self._files: dict[str, Member] = {}
        self._folders: set[str] = set()
        self._unusable: list[tuple[str, str]] = []
        self._hidden: set[str] = set()

    def file(self, name: str, member: Member) -> None:
        """Adds a file by its path; it replaces an earlier file of the same path."""
        path = self._visible(name)
        if path is not None:
            if path in self._files:
                self._unusable.append((path, REPLACED))
            self._files[path] = member

    def folder(self, name: str) -> None:
        """Adds a folder by its path."""
        path = self._visible(name)
        if path is not None:
            self._folders.add(path)

    def unusable(self, name: str, reason: str) -> None:
        """Adds an unusable entry by its path, with the reason."""
        path = self._visible(name)
        if path is not None:
            self._unusable.append((path, reason))

    def contents(self) -> Contents:
        """The entries that were added so far."""
        hidden = [(path, HIDDEN) for path in sorted(self._hidden)]
        return Contents(self._files, frozenset(self._folders), (*sorted(self._unusable), *hidden))

    def _visible(self, name: str) -> str | None:
        """The normalised path of an entry; `None` if it is the root or hidden.

        Hidden entries are noted in `_hidden`; a hidden folder counts as one entry, whatever it contains.
        """
        path = as_text(in_archive(name))
        parts = path.split("/")
        hidden = next((number for number, part in enumerate(parts, 1) if is_hidden(part)), None)
        if hidden is not None:
            self._hidden.add("/".join(parts[:hidden]))
        return path if path and hidden is None else None


@contextmanager
def damage_named(source: str, fault: str) -> Iterator[None]:
    """Turns errors of an archive reader within the block into a `DataError`.

    The `DataError` names `source` and `fault`. Readers of archives raise errors of any type on damaged bytes,
    also `OSError` for an invalid seek. Other errors of the operating system pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{source}: {fault} ({one_line(error)}): get it again") from None


def in_archive(name: str) -> str:
    """The name of an entry as a normalised path in its archive; empty for the root."""
    path = posixpath.normpath(name).lstrip("/")
    return "" if path == "." else path


def is_hidden(part: str) -> bool:
    """Returns True if one part of a path is hidden or a by-product of an operating system."""
    return part.startswith((".", *_BY_PRODUCTS)) and part != ".."


def as_text(name: str) -> str:
    """`name` as one line of text, with undecoded bytes, control characters and line ends escaped."""
    if name.isprintable():
        return name
    return "".join(
        _escaped(letter) if unicodedata.category(letter) in _NOT_TEXT else letter for letter in name
    )


def _escaped(letter: str) -> str:
    """The escape of a character: `\\xNN` for a surrogate that stands for byte NN, else Python's own."""
    byte = ord(letter) - 0xDC00  # as codecs' error handler `surrogateescape` encodes an undecodable byte
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()


def read(raw: Path, ref: Ref) -> bytes:
    """The bytes at `ref`, whose file is relative to `raw`, absolute, or an fsspec URL.

    Raises:
        DataError: the file cannot be read, or the content no longer has the size that was listed.
    """
    try:
        content = _read_remote(ref) if "://" in ref.name else _read_local(raw / ref.name, ref)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(
            f"{as_text(ref.name)}: cannot be read ({reason}); was it moved? run fetch again"
        ) from None
    if ref.size not in (UNKNOWN, len(content)):
        raise DataError(
            f"{as_text(ref.name)}: {len(content)} bytes for {ref.key}, not {ref.size}: "
            "it changed; run fetch again"
        )
    return content


def _read_remote(ref: Ref) -> bytes:
    whole = ref.offset == WHOLE_FILE
    return files.read(ref.name) if whole else files.read(ref.name, ref.offset, ref.offset + ref.size)


def _read_local(path: Path, ref: Ref) -> bytes:
    with path.open("rb") as file:
        if ref.offset == WHOLE_FILE:
            return file.read()
        file.seek(ref.offset)
        return file.read(ref.size)


def read_file(raw: Path, contents: Contents, path: str, source: str) -> bytes:
    """The bytes of the file `path`; raises a `DataError` that names `source` if the file is missing."""
    return read(raw, reference_to(contents, path, path, source))


def reference_to(contents: Contents, path: str, key: str, source: str) -> Ref:
    """A reference to the file `path`, with the key `key`; raises `DataError` if the file is missing."""
    member = contents.files.get(path)
    if member is None:
        reasons = [f" ({reason})" for name, reason in contents.unusable if f"{path}/".startswith(f"{name}/")]
        raise DataError(f"{source}: {path} is missing{''.join(reasons[:1])}")
    return Ref(key, member.place, member.offset, member.size, path=path)


def folder_with(contents: Contents, marker: str, source: str) -> str:
    """The folder that contains the file `marker`, as `""` or with a trailing `/`.

    If several folders contain it, the one with the fewest parents is returned, then the first by name.

    Raises:
        DataError: no folder contains it; the error names the top folders.
    """
    names = [name for name in contents.files if f"/{name}".endswith(f"/{marker}")]
    if not names:
        raise DataError(f"{source}: {marker} is missing; there is: {top_names(contents.files)}")
    return min((name.removesuffix(marker) for name in names), key=lambda folder: (folder.count("/"), folder))


def top_names(paths: Iterable[str]) -> str:
    """The first parts of these paths, sorted, at most ten, for a message."""
    return ", ".join(sorted({path.partition("/")[0] for path in paths})[:10]) or "nothing"
