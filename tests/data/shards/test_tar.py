"""Scanning a tar gives what Python's `tarfile` reads, for any content."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from pipelines.data.shards.tar import _members, _plain_members, scan, write_tar


def tar_of(path: Path, *members: tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info in members:
            info.size = 700 if info.isfile() else 0
            tar.addfile(info, io.BytesIO(bytes(700)))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "a.json" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize(
    "members",
    [
        ["a.json", "a.png", "b.json"],
        ["folder/a.json", "a" * 100, "a" * 60 + "/" + "b" * 80],
        ["é.json", "a b.png"],
    ],
)
def test_members_are_those_of_tarfile(tmp_path: Path, members: list[str], format: int) -> None:
    path = tar_of(tmp_path / "a.tar", *map(member, members), format=format)
    assert _plain_members(path) in ([], _members(path))
    assert [entry.key for entry in scan(path, 0, 0, ("json", "png"))] == list(
        dict.fromkeys(name.partition(".")[0] for name in members if name.endswith((".json", ".png")))
    )


def test_shards_have_plain_headers(tmp_path: Path) -> None:
    write_tar(
        str(tmp_path),
        "a.tar",
        [(f"k{number}", {"png": bytes(number), "json": b"{}"}) for number in range(600)],
    )
    found = _plain_members(tmp_path / "a.tar")
    assert len(found) == 1200
    assert found == _members(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_what_is_no_file_is_left_out(tmp_path: Path, kind: bytes) -> None:
    path = tar_of(tmp_path / "a.tar", member("a.json"), member("b.json", kind), member("c.json"))
    assert [entry.key for entry in scan(path, 0, 0, ("json",))] == ["a", "c"]


def test_a_tar_with_a_changed_byte_or_a_part_of_one_is_what_tarfile_says(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "a.tar", *(member(f"{number}.json") for number in range(5))).read_bytes()
    chance, path = random.Random(0), tmp_path / "b.tar"
    for number in range(200):
        content = bytearray(whole if number % 2 else whole[: chance.randrange(len(whole))])
        if number % 2:
            content[chance.randrange(6 * 512)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            wanted = _members(path)
        except tarfile.TarError as error:
            assert _plain_members(path) == []
            with pytest.raises(type(error)):
                scan(path, number, 1, ("json",))
        else:
            assert _plain_members(path) in ([], wanted)
