"""Roots at URLs: the content, not the name, decides between folder and archive."""

import functools
import gzip
import http.server
import io
import threading
import zipfile
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data.formats.archive import UNKNOWN, Ref, read
from pipelines.data.formats.download import is_file
from pipelines.data.formats.roots import open_root
from pipelines.data.shards.sample import DataError

FILES = {
    "train/cat/a b.jpg": b"one",
    "train/cat/100%.jpg": b"three",
    "train/dög/ü&'.jpg": b"fivee",
    "x.txt": b"",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "served/in"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    with zipfile.ZipFile(root.parent / "in.zip", "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    (root.parent / "IN.ZIP").write_bytes((root.parent / "in.zip").read_bytes())
    (root.parent / "download").write_bytes((root.parent / "in.zip").read_bytes())
    return root


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. Its listings also link to other sort orders, the parent and other sites."""

    def list_directory(self, path):
        names = sorted(entry.name + "/" * entry.is_dir() for entry in Path(path).iterdir())
        links = "".join(f'<A class="x" href="{quote(name)}">{name[:5]}..&gt;</A>\n' for name in names)
        page = (
            '<html><a href="?C=N;O=D">Name</a><a href="../">up</a>'
            f'<a href="https://nginx.org/">nginx</a>\n{links}</html>'
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/html;charset=utf-8")
        self.end_headers()
        return io.BytesIO(page.encode())

    def do_GET(self):
        if unquote(self.path).endswith("/secret/"):
            self.send_error(403)
        else:
            super().do_GET()

    def guess_type(self, path):
        # A wrong type for the archive at `download`
        return "text/html" if path.endswith("download") else super().guess_type(path)

    def log_message(self, *_):
        return


@pytest.fixture
def server(folder):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder.parent))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def found(root: str, tmp_path: Path, name: str = "one") -> dict[str, bytes]:
    raw = tmp_path / name
    contents, checksum = open_root(root, None, raw, tmp_path / "cache", progress=False)
    assert len(checksum) == 64
    return {
        name: read(raw, Ref("key", member.place, member.offset, member.size))
        for name, member in contents.files.items()
    }


@pytest.mark.parametrize(
    "address",
    [
        "in.zip",
        "IN.ZIP",
        "in.zip?download=1",
        "in.zip?X-Amz-Signature=" + "0123456789abcdef" * 32,
        "download",
        "in",
        "in/",
    ],
)
def test_an_http_address_of_an_archive_or_folder_gives_its_files(server, tmp_path, address):
    assert found(f"{server}/{address}", tmp_path) == FILES


def test_an_http_folder_that_may_not_be_listed_is_named(server, folder, tmp_path):
    (folder / "train/secret").mkdir()
    with pytest.raises(
        DataError, match=r"^http://.*/in: cannot be listed \([^\n]*403[^\n]*\): check the address"
    ):
        found(f"{server}/in", tmp_path)


def test_an_address_with_nothing_or_a_page_is_named_in_one_line(server, folder, tmp_path):
    (folder.parent / "page.html").write_text("<!doctype html><a href='https://example.org/in.zip'>here</a>")
    with pytest.raises(
        DataError,
        match=r"/page\.html: no archive, and no folder is at [^\n]*/page\.html/: check the address$",
    ):
        found(f"{server}/page.html", tmp_path)
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match=r"/empty: the page there lists no files: give an archive[^\n]*$"):
        found(f"{server}/empty", tmp_path)
    with pytest.raises(DataError, match=r"/gone\.zip: 404 [^\n]*$"):
        found(f"{server}/gone.zip", tmp_path)
    (folder.parent / "notes.zip").write_text("no archive")
    with pytest.raises(DataError, match=r"notes\.zip: not a tar, tar\.gz or zip"):
        found(f"{server}/notes.zip", tmp_path)


@pytest.mark.parametrize("root", ["nonsense://x/y", "zip://x.jpg::file:///y.zip", "memory://nothing/there"])
def test_a_root_that_no_storage_has_is_one_line(tmp_path, root):
    with pytest.raises(DataError, match=f"^{root}: [^\n]*$"):
        found(root, tmp_path)


class Terse(MemoryFileSystem):
    """A storage that gives no kinds and no sizes; only a slash at the end of a name tells a folder."""

    protocol = "terse"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("terse://", "memory://"))

    def info(self, path, **options):
        return self._terse(super().info(path, **options))

    def ls(self, path, detail=True, **options):
        return [self._terse(info) for info in super().ls(path, detail=True, **options)]

    @staticmethod
    def _terse(info):
        return (
            {"name": info["name"] + "/"}
            if info["type"] == "directory"
            else {"name": info["name"], "size": None}
        )


def test_a_storage_need_not_tell_sizes_and_kinds(tmp_path):
    fsspec.register_implementation("terse", Terse, clobber=True)
    Terse.store.clear()
    for name, content in FILES.items():
        Terse().pipe_file(f"/in/{name}", content)
    assert found("terse://in", tmp_path) == FILES
    contents, _ = open_root("terse://in", None, tmp_path / "raw", tmp_path / "cache", progress=False)
    assert {member.size for member in contents.files.values()} == {UNKNOWN}


@pytest.mark.parametrize(("kind", "is_it"), [("file", True), ("directory", False)])
def test_other_storages_are_asked_what_is_there(tmp_path, kind, is_it):
    memory = fsspec.filesystem("memory")
    address = f"memory://{tmp_path.name}/archive.tar.gz"  # may also be the name of a folder
    memory.pipe_file(address if is_it else f"{address}/x.jpg", gzip.compress(b""))
    assert is_file(address) == is_it
