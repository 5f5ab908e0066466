"""If the files that `fetch` wrote are damaged, one line says to run it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.raw.listing import ListedImages, write_raw_manifest, write_references
from pipelines.data.shards.sample import DataError, Description

NAME = "a\u2028b.png"  # U+2028 is a line break for str.splitlines, but not in JSON lines


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with an index and a manifest, as `fetch` writes them."""
    write_references(tmp_path, "train", [("k0", NAME, 0, 5), ("k1", "c.png", 5, 5)])
    write_raw_manifest(tmp_path, Description(("a", "b"), "multiclass", "test", "00", {"train": 2}))
    return tmp_path


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b'{"classes": ["a"', b"{}", b"[1]", b"\xff"])
def test_a_damaged_manifest_is_one_line(raw: Path, content: bytes) -> None:
    assert ListedImages().describe(raw).classes == ("a", "b")
    (raw / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"^[^\n]*manifest\.json: [^\n]*run fetch again$"):
        ListedImages().describe(raw)


@pytest.mark.parametrize("cut", [b'["k1", "c.p', b"\0\0", b"\xff"])
def test_a_damaged_list_is_one_line(raw: Path, cut: bytes) -> None:
    assert [reference[1] for reference in ListedImages().references(raw, "train")] == [NAME, "c.png"]
    with open(raw / "train.index.jsonl", "ab") as file:
        file.write(cut)
    with pytest.raises(DataError, match=r"^[^\n]*train\.index\.jsonl: damaged [^\n]*run fetch again$"):
        ListedImages().references(raw, "train")
