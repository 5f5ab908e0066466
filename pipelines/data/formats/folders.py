"""Lists the files of a folder, on this machine or at any URL."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

from pipelines.data.formats.archive import (
    CIRCLE,
    NOTHING,
    SPECIAL,
    UNKNOWN,
    UNREADABLE,
    WHOLE_FILE,
    Contents,
    Listing,
    Member,
    as_text,
    is_hidden,
)
from pipelines.data.formats.download import is_http
from pipelines.data.shards.sample import DataError
from pipelines.storage import files
from pipelines.storage.errors import one_line
from pipelines.storage.retry import retry

_LINK_FAULTS = {errno.ENOENT: NOTHING, errno.ENOTDIR: NOTHING, errno.ELOOP: CIRCLE}

Entry = tuple[str, str, Member]  # path in the data set; kind (`file`, `directory` or another); location


def list_folder(root: str) -> Contents:
    """The entries of a folder, local or at any fsspec URL. Local links are followed wherever they lead.

    Raises:
        DataError: a folder cannot be listed, or the server of an http address does not list its files.
    """
    if "://" not in root:
        return _list_local(root)
    found = Listing()
    try:
        for name, kind, member in _linked(root) if is_http(root) else _listed(root):
            if kind == "directory":
                found.folder(name)
            elif kind == "file":
                found.file(name, member)
            else:
                found.unusable(name, SPECIAL)
    except FileNotFoundError as error:
        raise DataError(
            f"{root}: no archive, and no folder is at {one_line(error)}: check the address"
        ) from None
    except OSError as error:
        raise DataError(
            f"{root}: cannot be listed ({one_line(error)}): check the address and the right to list it"
        ) from None
    return found.contents()


def _list_local(root: str) -> Contents:
    found = Listing()
    # Folders still to list: place, path in the data set, real paths of the folders above
    folders: list[tuple[str, str, tuple[str, ...]]] = [(root, "", ())]
    while folders:
        folder, inside, above = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            advice = "give the right to list it, or move it away"
            raise DataError(f"{as_text(folder)}: cannot be listed ({error.strerror}): {advice}") from None
        above = (*above, os.path.realpath(folder))
        for entry in entries:
            name = posixpath.join(inside, entry.name)
            kind = _kind_of(entry, above)
            if kind == "folder":
                found.folder(name)
                if not is_hidden(entry.name):
                    folders.append((entry.path, name, above))
            elif kind == "file":
                found.file(name, Member(entry.path, WHOLE_FILE, entry.stat().st_size))
            else:
                found.unusable(name, kind)
    return found.contents()


def _kind_of(entry: os.DirEntry[str], above: tuple[str, ...]) -> str:
    """`folder`, `file`, or the reason why a local entry is unusable.

    `above` has the real paths of the folders that contain the entry, to detect links in a circle.
    """
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return _LINK_FAULTS.get(error.errno or 0, UNREADABLE)
    if stat.S_ISDIR(mode):
        return (
            CIRCLE if entry.is_symlink() and _contains_any(os.path.realpath(entry.path), above) else "folder"
        )
    if not stat.S_ISREG(mode):
        return SPECIAL
    return "file" if os.access(entry.path, os.R_OK) else UNREADABLE


def _contains_any(folder: str, places: tuple[str, ...]) -> bool:
    """Returns True if one of these real paths is `folder` or lies in it."""
    return any(os.path.commonpath((folder, place)) == folder for place in places)


def _listed(root: str) -> Iterator[Entry]:
    """Yields the entries below a URL on a storage that lists folders. It may leave out kinds and sizes."""
    filesystem, base = files.file_system(root)
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    whole = bool(files.BUCKETS & protocols)  # one call lists all levels
    folders, seen = [base], {""}
    while folders:
        call = partial(filesystem.find, withdirs=True) if whole else filesystem.ls
        infos = retry(partial(call, folders.pop(), detail=True), root)
        for info in infos.values() if isinstance(infos, dict) else infos:
            name = info["name"].strip("/").removeprefix(base.strip("/")).strip("/")
            if name in seen:  # the root, or a folder listed both as a prefix and as an object of its name
                continue
            seen.add(name)
            is_folder = info["name"].endswith("/") or info.get("type") == "directory"
            if is_folder and not whole:
                folders.append(info["name"])
            size = info.get("size")
            place = Member(f"{root.rstrip('/')}/{name}", WHOLE_FILE, UNKNOWN if size is None else int(size))
            yield name, "directory" if is_folder else info.get("type") or "file", place


def _linked(root: str) -> Iterator[Entry]:
    """Yields the entries below an http address whose server lists a folder as a page of links."""
    top = f"{root.rstrip('/')}/"
    pages, seen = [top], {top}
    while pages:
        for url in _links(pages.pop()):
            if url not in seen:
                seen.add(url)
                is_folder = url.endswith("/")
                if is_folder:
                    pages.append(url)
                name = unquote(url, errors="surrogateescape")[len(unquote(top)) :]
                yield name.strip("/"), "directory" if is_folder else "file", Member(url, WHOLE_FILE, UNKNOWN)
    if len(seen) == 1:
        raise DataError(
            f"{root}: the page there lists no files: "
            "give an archive, or a folder whose server lists its files"
        )


def _links(page: str) -> Iterator[str]:
    """Yields the addresses below the folder `page` that its listing links to.

    Links with a query are skipped, because servers use them to sort the same listing by another column.
    """
    filesystem, _ = files.file_system(page)
    content: bytes = retry(partial(filesystem.cat_file, page), page)
    parser = _Anchors()
    parser.feed(content.decode(errors="replace"))
    for reference in parser.references:
        with suppress(ValueError):  # the reference is not a valid address
            url = urljoin(page, reference)
            parts = urlsplit(url)
            if unquote(url).startswith(unquote(page)) and not (parts.query or parts.fragment):
                yield url


class _Anchors(HTMLParser):
    """Collects the targets of a page's links in `references`."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attributes if tag == "a" and name == "href" and value]
