"""Downloads that resume after an interruption.

`<destination>.part` holds the bytes received so far, and `<destination>.part.json` the URL and version of the
remote file. Once length and digest are right, the file is renamed to `<destination>`.
"""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.data.shards.sample import DataError
from pipelines.progress import bar
from pipelines.storage.errors import one_line
from pipelines.storage.files import file_digest, file_system, read_record, rename, write_json
from pipelines.storage.retry import retry

_BLOCK = 1 << 18  # bytes
_TIMEOUT = 60.0  # seconds that the connection may be silent
_BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)
_MAGIC = (b"\x1f\x8b", b"PK\x03\x04", b"PK\x05\x06")  # first bytes of gzip and zip
_MAGIC_OF_TAR = slice(257, 262), b"ustar"


@dataclass
class _Stream:
    """An open remote file, positioned at byte `offset` of `total`."""

    reader: Any
    offset: int
    total: int | None  # `None` if the server does not tell
    version: str | None  # changes if the remote file changes; `None` if the server gives none


def download(
    url: str,
    destination: Path,
    *,
    digest: str | None = None,
    progress: bool = True,
    attempts: int = 5,
    pause: float = 1.0,
) -> None:
    """Downloads the file at `url` (http, https or any fsspec URL); resumes an interrupted download.

    Args:
        url: address of the file.
        destination: local path. If it exists and has the digest, or no digest is given, nothing is done.
        digest: `sha256:<hex>` or `md5:<hex>` of the expected content.
        progress: if True, shows a progress bar.
        attempts: number of failed attempts in a row, without a new byte, after which the download fails.
        pause: seconds before the next attempt; doubled after each further failure.

    Raises:
        DataError: the file cannot be read, ends early, or has another digest. If it ended early, the bytes
            received are kept for the next call.
    """
    if destination.exists() and (digest is None or _digest_of(destination, digest) == digest):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(destination.name + ".part")
    failures, reason = 0, ""
    while failures < attempts:
        before = _size(partial)
        try:
            if _receive(url, partial, trusted=digest is not None, progress=progress):
                break
            reason = f"the connection ended after {_size(partial)} bytes"
        except _BROKEN as error:
            reason = _transient(error, url)
        failures = 0 if _size(partial) > before else failures + 1
        if failures < attempts:
            time.sleep(pause * 2**failures)
    else:
        raise DataError(f"{url}: {reason}; what has arrived is kept: run again to go on from there")
    _accept(url, partial, destination, digest)


def is_http(url: str) -> bool:
    """Returns True if `url` is an http or https address."""
    return url.startswith(("http://", "https://"))


def is_file(url: str, *, attempts: int = 5, pause: float = 1.0) -> bool:
    """Returns True if there is a file at `url` (http, https or any fsspec URL), False for a folder.

    An http server lists a folder as a web page. So a response that is a web page counts as a folder, unless
    it begins with the magic bytes of an archive. Other storages tell files from folders themselves.

    Raises:
        DataError: nothing is there, or the storage cannot be reached.
    """
    if not is_http(url):
        try:
            filesystem, path = file_system(url)
            info = retry(lambda: filesystem.info(path), url)
        except FileNotFoundError:
            raise DataError(f"{url}: no such file or folder") from None
        except (OSError, ValueError, ImportError) as error:  # unknown protocol, or its library is missing
            raise DataError(
                f"{url}: cannot be read ({one_line(error)}): check the address and the right to read it"
            ) from None
        return info.get("type", "file" if info.get("size") else "directory") == "file"
    for attempt in range(attempts):
        try:
            with _open_http(url, 0, None).reader as response:
                return not _is_web_page(response.read(512), response.headers.get_content_type())
        except _BROKEN as error:
            reason = _transient(error, url)
        if attempt + 1 < attempts:
            time.sleep(pause * 2**attempt)
    raise DataError(f"{url}: {reason}: check the address")


def _is_web_page(start: bytes, content_type: str) -> bool:
    """Returns True if a response is a web page, judged by its first 512 bytes and its content type."""
    place, magic = _MAGIC_OF_TAR
    if start.startswith(_MAGIC) or start[place] == magic:
        return False
    return content_type == "text/html" or start.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _transient(error: Exception, url: str) -> str:
    """The text of an error after which another attempt may succeed; raises `DataError` for a final error."""
    if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429):
        raise DataError(
            f"{url}: {error.code} {error.reason}: check the address and the right to read it"
        ) from None
    return one_line(error)


def _receive(url: str, partial: Path, *, trusted: bool, progress: bool) -> bool:
    """Appends the bytes of one connection to `partial`; returns True if the file is then complete.

    Resuming needs a version from the server, or a digest (`trusted`) that will be checked in the end. Without
    either, the bytes in `partial` could belong to another version of the file, so the download starts over.
    """
    note = partial.with_name(partial.name + ".json")
    known = (read_record(note, dict) if partial.exists() else None) or {}
    version = known.get("version") if known.get("url") == url else None
    resumable = known.get("url") == url and (version is not None or trusted)
    stream = _open(url, _size(partial) if resumable else 0, version)
    with stream.reader:
        if stream.total is None and not trusted:
            raise DataError(
                f"{url}: the server does not tell the length: give a sha256 so that the end can be known"
            )
        with partial.open("r+b" if stream.offset else "wb") as file:
            write_json(note, {"url": url, "version": stream.version})
            file.truncate(stream.offset)
            file.seek(stream.offset)
            with bar("downloading", stream.total, unit="bytes", done=stream.offset, show=progress) as shown:
                while block := _read(stream.reader):
                    file.write(block)
                    shown.update(len(block))
    return stream.total is None or _size(partial) == stream.total


def _read(reader: Any) -> bytes:
    """The next bytes; empty at the end and after a broken connection (the caller compares the length)."""
    try:
        content: bytes = reader.read(_BLOCK)
    except http.client.IncompleteRead as error:
        return error.partial
    except OSError:
        return b""
    return content


def _open(url: str, offset: int, version: str | None) -> _Stream:
    """Opens the remote file at byte `offset` if it still has this `version`, else at its start.

    Without a `version`, an http server is asked for the bytes from `offset` on.
    """
    if is_http(url):
        return _open_http(url, offset, version)
    filesystem, path = file_system(url)
    try:
        size = filesystem.info(path).get("size")
        current = f"{size}-{filesystem.ukey(path)}"
        offset = offset if version == current else 0
        reader = filesystem.open(path, "rb")
        reader.seek(offset)
    except OSError as error:
        raise DataError(
            f"{url}: cannot be read ({error}): check the address and the right to read it"
        ) from None
    return _Stream(reader, offset, size, current)


def _open_http(url: str, offset: int, version: str | None) -> _Stream:
    """Opens an HTTP response, through a range request (RFC 9110, section 14) if `offset` is not 0."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "bcos-pipelines"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version is not None:
            headers["If-Range"] = version
    try:
        quoted = quote(url, safe="!#$%&'()*+,/:;=?@[]~")
        response = urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # the remote file has at most `offset` bytes
            if error.headers.get("Content-Range") == f"bytes */{offset}":  # exactly `offset`: it is complete
                return _Stream(io.BytesIO(), offset, offset, version)
            return _open_http(url, 0, None)
        raise
    etag = response.headers.get("ETag", "")
    current = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    if response.status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] == str(offset):
            return _Stream(response, offset, _count(total), current)
        response.close()
        return _open_http(url, 0, None)
    return _Stream(response, 0, _count(response.headers.get("Content-Length", "")), current)


def _count(text: str) -> int | None:
    """The number in a header; `None` if there is none."""
    return int(text) if text.isdigit() else None


def _accept(url: str, partial: Path, destination: Path, digest: str | None) -> None:
    """Renames a complete download to its final name if its digest is right; deletes it otherwise."""
    found = None if digest is None else _digest_of(partial, digest)
    if found != digest:
        partial.unlink()
        raise DataError(f"{url}: the content has {found}, where {digest} was expected: it was removed")
    rename(partial, destination)
    partial.with_name(partial.name + ".json").unlink(missing_ok=True)


def _digest_of(path: Path, like: str) -> str:
    """The digest of a file, `<algorithm>:<hex>`, by the algorithm of the digest `like`."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{file_digest(path, algorithm)}"


def _size(path: Path) -> int:
    """Size of a file in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0
