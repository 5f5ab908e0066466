"""Downloads are resumed and verified, and never taken for complete too early."""

import hashlib
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest

from pipelines.data.formats.download import download
from pipelines.data.shards.sample import DataError

CONTENT = np.random.default_rng(0).integers(0, 256, 900_000, np.uint8).tobytes()
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server:
    """Serves `content`, cuts each connection after `cut` bytes, and records the requested ranges."""

    def __init__(self):
        self.content, self.cut, self.etag, self.ranges, self.tell_length = CONTENT, 1 << 40, '"one"', [], True
        self.ranges_allowed = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"

    def answer(self, request):
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if request.path != "/file.bin":
            request.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges_allowed else 0
        if request.headers.get("If-Range") not in (None, self.etag):
            start = 0
        if start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.etag:
            request.send_header("ETag", self.etag)
        if self.tell_length:
            request.send_header("Content-Length", str(len(self.content) - start))
        request.end_headers()
        request.wfile.write(self.content[start : start + self.cut])
        request.close_connection = True


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def get(server, path, **options):
    download(server.url, path, **{"progress": False, "attempts": 1, "pause": 0.0, **options})


def test_a_cut_connection_is_resumed_by_range(server, tmp_path):
    server.cut = 400_000
    get(server, tmp_path / "file", digest=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=400000-", "bytes=800000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_later_call_goes_on_where_an_earlier_one_was_stopped(server, tmp_path, monkeypatch):
    path = tmp_path / "file"
    server.cut = 300_000
    monkeypatch.setattr("pipelines.data.formats.download.time.sleep", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(server, path)
    assert not path.exists()
    assert (tmp_path / "file.part").stat().st_size == 300_000
    server.cut = 1 << 40
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_truncated_download_never_passes_for_whole(server, tmp_path):
    server.cut = 0
    with pytest.raises(DataError, match="run again"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_file_that_changed_meanwhile_starts_anew(server, tmp_path, monkeypatch):
    path = tmp_path / "file"
    server.cut = 300_000
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.data.formats.download.time.sleep", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(server, path)
    server.content, server.etag, server.cut = CONTENT[::-1], '"two"', 1 << 40
    get(server, path)
    assert path.read_bytes() == CONTENT[::-1]


def test_a_part_without_a_version_is_not_trusted_without_a_digest(server, tmp_path, monkeypatch):
    path = tmp_path / "file"
    server.cut, server.etag = 300_000, None
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.data.formats.download.time.sleep", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(server, path)
    server.content, server.cut = CONTENT[::-1], 1 << 40
    get(server, path)
    assert path.read_bytes() == CONTENT[::-1]
    assert server.ranges == [None, None]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.json").write_text(f'{{"url": "{server.url}", "version": "\\"one\\""}}')
    server.ranges_allowed = False
    get(server, path)
    assert path.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_starts_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * (len(CONTENT) + 5))
    (tmp_path / "file.part.json").write_text(f'{{"url": "{server.url}", "version": "\\"one\\""}}')
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_part_that_was_not_checked_yet_is_not_downloaded_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.data.formats.download._digest_of", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file", digest=SHA256)
    monkeypatch.undo()
    get(server, tmp_path / "file", digest=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT)}-"]


def test_another_digest_is_refused_and_removed(server, tmp_path):
    with pytest.raises(DataError, match=f"{SHA256}.*sha256:{'0' * 64}"):
        get(server, tmp_path / "file", digest=f"sha256:{'0' * 64}")
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / "file.part").exists()


def test_an_end_that_cannot_be_known_is_refused(server, tmp_path):
    server.tell_length, server.cut = False, 300_000
    with pytest.raises(DataError, match="give a sha256"):
        get(server, tmp_path / "file")
    with pytest.raises(DataError, match="expected"):
        get(server, tmp_path / "file", digest=SHA256)
    assert not (tmp_path / "file").exists()


def test_what_is_there_and_right_is_not_downloaded_again(server, tmp_path):
    for _ in range(2):
        get(server, tmp_path / "file", digest=SHA256)
    assert len(server.ranges) == 1


def test_a_missing_file_is_named(server, tmp_path):
    url = server.url.replace("file.bin", "nothing.bin")
    with pytest.raises(DataError, match=r"nothing\.bin: 404"):
        download(url, tmp_path / "file", progress=False)


class _Broken(io.BytesIO):
    """A remote file whose connection ends after 300,000 bytes."""

    def read(self, size=-1):
        if self.tell() >= 300_000:
            raise OSError("connection lost")
        return super().read(min(size, 300_000 - self.tell()))


def test_an_fsspec_url_is_resumed(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/sources/file.bin", CONTENT)
    path, starts = tmp_path / "file", []
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "open", lambda *_: _Broken(CONTENT))
        patch.setattr("pipelines.data.formats.download.time.sleep", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            download("memory://sources/file.bin", path, progress=False)
    assert (tmp_path / "file.part").stat().st_size == 300_000
    original = type(memory).open

    def opened(*arguments):
        file = original(*arguments)
        seek = file.seek
        monkeypatch.setattr(
            file, "seek", lambda offset: (starts.append(offset), seek(offset))[1], raising=False
        )
        return file

    monkeypatch.setattr(type(memory), "open", opened)
    download("memory://sources/file.bin", path, digest=SHA256, progress=False)
    assert path.read_bytes() == CONTENT
    assert starts == [300_000]


def test_a_missing_fsspec_url_is_named(tmp_path):
    with pytest.raises(DataError, match="memory://sources/none"):
        download("memory://sources/none", tmp_path / "none", progress=False)


@pytest.mark.parametrize("note", [b"", b"\0\0", b"[1]", b'{"url": "htt'])
def test_a_note_that_a_crash_left_unreadable_is_none(server, tmp_path, note):
    (tmp_path / "file.part").write_bytes(CONTENT[:400_000])
    (tmp_path / "file.part.json").write_bytes(note)
    get(server, tmp_path / "file", digest=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
