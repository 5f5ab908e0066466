"""Files that go to a storage and come back."""

from pathlib import Path

import fsspec

import tests.support.flaky  # noqa: F401, registers flaky://
from pipelines.storage.publish import publish, pull


def test_files_come_back_as_they_went(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    publish(tmp_path, "flaky://bucket/files", ["a/b.txt", "c.txt"])
    pull("flaky://bucket/files", tmp_path / "back", ["c.txt", "a/b.txt"])
    assert (tmp_path / "back/a/b.txt").read_text() == "b"
    assert fsspec.filesystem("memory").cat_file("/bucket/files/c.txt") == b"c"
