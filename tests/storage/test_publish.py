"""Files copied to a storage and back."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.storage.errors import StorageError
from pipelines.storage.publish import Upload, check_name, describe, fetch, publish, pull
from tests.support.disk import Disk
from tests.support.flaky import FlakyFileSystem


def test_files_come_back_as_they_went(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    publish(tmp_path, "flaky://bucket/files", ["a/b.txt", "c.txt"])
    pull("flaky://bucket/files", tmp_path / "back", ["c.txt", "a/b.txt"])
    assert (tmp_path / "back/a/b.txt").read_text() == "b"
    assert fsspec.filesystem("memory").cat_file("/bucket/files/c.txt") == b"c"


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_where_the_marker_is_after_a_crash_all_files_are_whole(tmp_path: Path, url: str) -> None:
    contents = {"a.tar": b"a" * 1000, "b.tar": b"b" * 500, "manifest.json": b'{"whole": true}'}
    (tmp_path / "here").mkdir()
    for name, content in contents.items():
        (tmp_path / "here" / name).write_bytes(content)
    with Disk(tmp_path / "there") as disk:
        publish(tmp_path / "here", url.format(tmp_path / "there/run"), contents)
    marked = [place for place in disk.places if "run/manifest.json" in place.content]
    assert 0 < len(marked) < len(disk.places)
    for place in marked:
        assert {name: place.content.get(f"run/{name}") for name in contents} == contents, place


def unlucky_at_first(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `call`: its first two calls raise errors of an unreachable storage."""
    troubles = iter([TimeoutError("away"), ConnectionError("away")])

    def troubled(*args: Any, **kwargs: Any) -> Any:
        if trouble := next(troubles, None):
            raise trouble
        return call(*args, **kwargs)

    return troubled


PARTS = ["", ".", "..", "a", "b", "...", "~", "a b", "ä", ".git", "x" * 300, "\\", "..\\..", "a:b", "%2e%2e"]
PARTS += ["\n", "\x00", "\u202e", "\ud800"]


def test_a_name_that_is_taken_lies_in_its_folder_whatever_it_is_made_of(tmp_path: Path) -> None:
    chance = random.Random(0)
    taken, said = 0, []
    for _ in range(2000):
        name = chance.choice(["", "/"]) + "/".join(chance.choice(PARTS) for _ in range(chance.randint(0, 4)))
        try:
            path = tmp_path / check_name(name)
        except StorageError as error:
            said.append(str(error))
        else:
            taken += 1
            assert Path(os.path.normpath(path)).relative_to(tmp_path).as_posix() == name
            path.parent.mkdir(parents=True, exist_ok=True)
    assert taken > 20
    assert all(line.isprintable() for line in said)


def test_names_of_an_index_in_the_storage_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/escape", b"evil")
    with pytest.raises(StorageError, match="leads out of its folder"):
        pull("memory://bucket/below", tmp_path / "back", ["../escape"])
    assert not list(tmp_path.iterdir())


def test_no_more_is_written_of_a_file_than_it_is_said_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("seven 7")
    known = describe(tmp_path, "a")
    fsspec.filesystem("memory").pipe_file("/bucket/grown/a", b"seven 7" * 1000)
    monkeypatch.setattr("pipelines.storage.publish.size_of", lambda url, name: 7)  # the file grew afterwards
    fetch("memory://bucket/grown", tmp_path / "back", [known])
    assert (tmp_path / "back/a").read_text() == "seven 7"
    with pytest.raises(StorageError, match="its content is not what was written there"):
        fetch("memory://bucket/grown", tmp_path / "back", [replace(known, sha256="0" * 64)])


def test_files_come_back_while_the_storage_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    publish(tmp_path, "flaky://bucket/failing", ["a"])
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(FlakyFileSystem, "open", unlucky_at_first(FlakyFileSystem.open))
    fetch("flaky://bucket/failing", tmp_path / "back", [describe(tmp_path, "a")])
    assert (tmp_path / "back/a").read_text() == "a"


def test_nothing_of_a_folder_is_published_if_a_file_of_it_is_missing_or_cut(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with pytest.raises(StorageError, match=r"b: there is no such file"):
        publish(tmp_path, "memory://bucket/parts", ["a", "b"])
    upload = Upload(str(tmp_path), "memory://bucket/parts", ("a",), {"a": 2})
    with pytest.raises(StorageError, match=r"a: has 1 bytes, not 2"):
        upload.check()
    assert not fsspec.filesystem("memory").exists("/bucket/parts")
    fsspec.filesystem("memory").pipe_file("/bucket/parts/a", b"aa")
    upload.check()  # it is there already
