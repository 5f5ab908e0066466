"""Files are written whole or not at all, at a path or any fsspec URL; errors are one line."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipelines.storage import files
from pipelines.storage.errors import StorageError, one_line
from pipelines.storage.publish import File, describe, fetch, publish, read_at_most
from tests.support import servers


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server that refuses every fifth request."""
    with servers.Storage() as storage, pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": storage.url, **servers.KEYS}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        storage.share = 0.2
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["path", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that does not exist yet."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    places = {"path": str(tmp_path / "a/b"), "file": f"file://{tmp_path}/a/b", "memory": f"memory://files/{tmp_path.name}"}
    return places[request.param]


def test_what_is_written_is_read(folder: str) -> None:
    value = {"class": "Größe", "nested": [1, None, {"x": 0.5}], "path": "\udc80"}
    assert files.read_json(f"{folder}/value.json") is None
    files.write_json(f"{folder}/value.json", value)
    assert files.read_json(f"{folder}/value.json") == value
    assert "Größe" in files.read(f"{folder}/value.json").decode()
    files.write(f"{folder}/bytes", b"12")
    files.write(f"{folder}/bytes", b"3")
    assert files.read(f"{folder}/bytes") == b"3"
    assert sorted(files.names_in(folder)) == ["bytes", "value.json"]
    files.remove(folder)
    files.remove(folder)
    assert files.names_in(folder) == []


def test_published_files_come_back_as_they_are_known(folder: str, tmp_path: Path) -> None:
    contents = {"large": bytes(range(256)) * 5000, "empty": b"", "below/a b.json": b"{}"}
    for name, content in contents.items():
        files.write(tmp_path / "here" / name, content)
    publish(tmp_path / "here", f"{folder}/below/it", contents)
    fetch(folder, tmp_path / "back", [describe(tmp_path / "here", name) for name in contents], below="below/it/")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in contents} == contents
    assert read_at_most(f"{folder}/below/it", "below/a b.json", 10) == b"{}"
    assert read_at_most(f"{folder}/below/it", "empty", 10) == b""
    for name in ("nothing", "below"):
        with pytest.raises(StorageError, match=rf"^{folder}/below/it/{name}: [^\n]*$"):
            fetch(f"{folder}/below/it", tmp_path / "back", [File(name, 2, "0" * 64)])


def test_a_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^s3://another/file: [^\n]*$"):
        files.write("s3://another/file", b"")


def fail_to_write(place: str) -> None:
    with files.staged(place) as path:
        path.write_bytes(b"new")
        raise ZeroDivisionError


def test_a_staged_file_appears_at_the_end_and_never_on_an_error(folder: str) -> None:
    with files.staged(f"{folder}/file") as path:
        path.write_bytes(b"old")
        assert "file" not in files.names_in(folder)
    with pytest.raises(ZeroDivisionError):
        fail_to_write(f"{folder}/file")
    assert files.names_in(folder) == ["file"]
    assert files.read(f"{folder}/file") == b"old"


def test_new_files_have_the_permissions_that_the_user_gives_them(tmp_path: Path) -> None:
    files.write(tmp_path / "written", b"")
    (tmp_path / "made").touch()
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_a_refused_write_is_one_line_with_its_errno_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write(tmp_path / "file", b"old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match=r"file: no space left on the device; nothing of it was kept$") as caught:
        files.write(tmp_path / "file", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["file"]
    assert files.read(tmp_path / "file") == b"old"


def test_digests_are_those_of_the_content_and_of_names_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert files.file_digest(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
    assert files.file_digest(tmp_path / "file", "md5") == hashlib.md5(b"content").hexdigest()
    assert files.combined_sha256({"a": "1", "b": "2"}) == files.combined_sha256({"b": "2", "a": "1"})
    assert files.combined_sha256({"a": "1", "b": "2"}) != files.combined_sha256({"a": "2", "b": "1"})


def test_any_error_is_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc ")) == "a b c"
    assert one_line(TimeoutError()) == "TimeoutError"
    assert len(one_line(ValueError("x" * 1000))) == 300
