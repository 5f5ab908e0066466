"""Downloads that resume where they were cut off.

The bytes that have arrived lie in `<destination>.part`; beside them `<destination>.part.json` names the version of the remote
file. The final name appears by rename, after length and digest are right.
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

import fsspec

from pipelines.data.shards.sample import DataError
from pipelines.progress import bar
from pipelines.storage.files import file_digest, read_record, rename, write_json

_BLOCK = 1 << 18  # bytes
_TIMEOUT = 60.0  # seconds without a byte


@dataclass
class _Stream:
    """An open remote file, positioned at byte `offset` of `total`."""

    reader: Any
    offset: int
    total: int | None
    version: str | None  # changes when the remote file does


def download(
    url: str, destination: Path, *, digest: str | None = None, progress: bool = True, attempts: int = 5, pause: float = 1.0
) -> None:
    """Downloads the file at `url` (http, https or any fsspec URL); resumes an earlier call.

    Args:
        url: what to download.
        destination: where to; if it exists and `digest` agrees with it, nothing is done.
        digest: `sha256:<hex>` or `md5:<hex>` that the content must have.
        progress: whether to show a progress bar.
        attempts: how often in a row the connection may fail without a byte.
        pause: seconds before trying again, doubled each time.

    Raises:
        DataError: the file cannot be read, ends early, or has another digest. The bytes of a file that ended early are kept
            for the next call.
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
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 429:
                raise DataError(f"{url}: {error.code} {error.reason}: check the address and the right to read it") from None
            reason = str(error)
        failures = 0 if _size(partial) > before else failures + 1
        if failures < attempts:
            time.sleep(pause * 2**failures)
    else:
        raise DataError(f"{url}: {reason}; what has arrived is kept: run again to go on from there")
    _accept(url, partial, destination, digest)


def _receive(url: str, partial: Path, *, trusted: bool, progress: bool) -> bool:
    """Appends the bytes of the connection to `partial`; returns whether the file is then complete.

    Without a version from the server or a digest (`trusted`) to check the whole, the bytes in `partial` could belong to
    another file: the download then starts anew.
    """
    note = partial.with_name(partial.name + ".json")
    known = (read_record(note, dict) if partial.exists() else None) or {}
    version = known.get("version") if known.get("url") == url else None
    resumable = known.get("url") == url and (version is not None or trusted)
    stream = _open(url, _size(partial) if resumable else 0, version)
    with stream.reader:
        if stream.total is None and not trusted:
            raise DataError(f"{url}: the server does not tell the length: give a sha256 so that the end can be known")
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
    """The next bytes; empty at the end or if the connection broke, which the file's length tells apart."""
    try:
        content: bytes = reader.read(_BLOCK)
    except http.client.IncompleteRead as error:
        return error.partial
    except OSError:
        return b""
    return content


def _open(url: str, offset: int, version: str | None) -> _Stream:
    """The remote file from byte `offset` on if it still has the known `version`, else from its start."""
    if url.startswith(("http://", "https://")):
        return _open_http(url, offset, version)
    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        info = filesystem.info(path)
        current = f"{info['size']}-{filesystem.ukey(path)}"
        offset = offset if version == current else 0
        reader = filesystem.open(path, "rb")
        reader.seek(offset)
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error}): check the address and the right to read it") from None
    return _Stream(reader, offset, info["size"], current)


def _open_http(url: str, offset: int, version: str | None) -> _Stream:
    """An HTTP response, of a range request (RFC 9110, section 14) if `offset` is not 0."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "bcos-pipelines"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version is not None:
            headers["If-Range"] = version
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # nothing lies beyond `offset`: what is there is all of the file, or not part of it
            if error.headers.get("Content-Range") == f"bytes */{offset}":
                return _Stream(io.BytesIO(), offset, offset, version)
            return _open_http(url, 0, None)
        raise
    etag = response.headers.get("ETag", "")
    current = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    if response.status == 206:
        span, _, total = response.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if int(span.split("-")[0]) == offset:
            return _Stream(response, offset, int(total) if total.isdigit() else None, current)
        response.close()
        return _open_http(url, 0, None)
    length = response.headers.get("Content-Length")
    return _Stream(response, 0, None if length is None else int(length), current)


def _accept(url: str, partial: Path, destination: Path, digest: str | None) -> None:
    """Renames a complete download to its final name if its digest is right; deletes it otherwise."""
    found = None if digest is None else _digest_of(partial, digest)
    if found != digest:
        partial.unlink()
        raise DataError(f"{url}: the content has {found}, where {digest} was expected: it was removed")
    rename(partial, destination)
    partial.with_name(partial.name + ".json").unlink(missing_ok=True)


def _digest_of(path: Path, like: str) -> str:
    """The digest of a file, by the algorithm that `like` names before its colon."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{file_digest(path, algorithm)}"


def _size(path: Path) -> int:
    """Bytes of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0
