"""Files that go to a storage and come back."""

from pathlib import Path

import fsspec
import pytest

import tests.support.flaky  # noqa: F401, registers flaky://
from pipelines.storage.publish import publish, pull
from tests.support.disk import Disk


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
