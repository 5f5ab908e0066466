"""Files are written atomically at a path or any fsspec URL; errors are one line."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.errors import UserError
from pipelines.storage import files
from pipelines.storage.errors import StorageError, one_line
from pipelines.storage.publish import File, describe, fetch, publish, read_at_most
from tests.support.disk import Disk


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
    fetch(
        folder, tmp_path / "back", [describe(tmp_path / "here", name) for name in contents], below="below/it/"
    )
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
    with pytest.raises(
        StorageError, match=r"file: no space left on the device; nothing of it was kept$"
    ) as caught:
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


def test_no_crash_leaves_a_part_of_a_file_under_its_name(tmp_path: Path) -> None:
    files.write(tmp_path / "run/file", b"old content")
    with Disk(tmp_path) as disk:
        files.write(tmp_path / "run/file", b"new content")
        files.write(tmp_path / "run/made/later/file", b"new content")
        with files.staged(tmp_path / "run/large") as path:
            path.write_bytes(b"new content")
    assert len(disk.places) > 20
    for place in disk.places:
        there = {
            name: content for name, content in place.content.items() if not Path(name).name.startswith(".")
        }
        assert there.pop("run/file") in (b"old content", b"new content"), place
        assert set(there.values()) <= {b"new content"}, place
    assert {**disk.places[-1].content} == dict.fromkeys(
        ("run/file", "run/made/later/file", "run/large"), b"new content"
    )


def test_one_of_many_creates_a_file(folder: str) -> None:
    contents = [str(number).encode() for number in range(6)]
    # fsspec's memory file system is not thread-safe.
    with ThreadPoolExecutor(1 if folder.startswith("memory") else len(contents)) as pool:
        got = list(pool.map(lambda content: files.create(f"{folder}/lock", content), contents))
    assert got.count(True) == 1
    assert files.read(f"{folder}/lock") == contents[got.index(True)]
    assert files.create(f"{folder}/lock", contents[got.index(True)])  # as a retry after a lost answer


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b'{"a": 1', b"\xff\xfe", b"nonsense"])
def test_a_damaged_file_is_one_line_or_for_what_can_be_made_again_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    place = tmp_path / "value.json"
    place.write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json: not JSON \([^\n]*\): run again what writes it$"):
        files.read_json(place)
    with caplog.at_level(logging.WARNING):
        assert files.read_record(place, dict) is None
    assert len(caplog.records) == 1
    assert place.read_bytes() == content


def test_a_record_is_of_its_type_and_what_is_required_is_named(tmp_path: Path) -> None:
    place = tmp_path / "value.json"
    assert files.read_record(place, dict) is None
    with pytest.raises(FileNotFoundError, match=r"value\.json: missing"):
        files.required_json(place)
    files.write_json(place, [1])
    assert files.read_record(place, dict) is None
    assert files.read_record(place, list) == files.required_json(place) == [1]


def test_a_store_that_has_no_conditional_put_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, put = fsspec.filesystem("memory"), type(fsspec.filesystem("memory")).pipe_file

    def refuse(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        put(self, path, value)

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    assert files.create("memory://store/lock", b"mine")
    assert not files.create("memory://store/lock", b"yours")
    assert files.read("memory://store/lock") == b"mine"


@pytest.mark.parametrize("links", [True, False])
def test_a_created_file_is_never_seen_in_part_where_there_are_hard_links(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    seen = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (seen.append((tmp_path / "a").exists()), sync(descriptor))
    )
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert files.create(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert seen[0] is False
    assert not files.create(tmp_path / "a", b"other")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
