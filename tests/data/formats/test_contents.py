"""Folders, tars and zips: every entry is listed as a file, as a folder, or as unusable with a reason."""

import errno
import io
import os
import re
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipelines.data.formats import archive
from pipelines.data.formats.archive import (
    CIRCLE,
    HIDDEN,
    NOTHING,
    OUTSIDE,
    REPLACED,
    SPECIAL,
    UNREADABLE,
    Contents,
    Ref,
    as_text,
)
from pipelines.data.formats.folders import list_folder
from pipelines.data.formats.packed import to_tar
from pipelines.data.formats.tars import list_tar
from pipelines.data.shards.sample import DataError

# (name, content) of a file; (name, tar type and target) of a link, such as `2../a`
Members = list[tuple[str, bytes | str]]


def tar_of(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = content[:1].encode(), content[1:]
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def listed(path: Path) -> Contents:
    return list_tar(path, str(path), "source", path.parent)


def content_of(contents: Contents, raw: Path) -> dict[str, bytes]:
    return {
        name: archive.read(raw, Ref("key", m.place, m.offset, m.size)) for name, m in contents.files.items()
    }


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with all kinds of links to places within the folder."""
    root = tmp_path / "tree"
    for name in (
        "train/cat/0.jpg",
        "train/dog/1.jpg",
        "pool/owl/2.jpg",
        "pool/owl/deep/3.jpg",
        ".cache/x.jpg",
        "train/cat/.DS_Store",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 100)
    (root / "train/dog/hard.jpg").hardlink_to(root / "train/cat/0.jpg")
    links = {
        "train/owl": "../pool/owl",  # a folder
        "train/dog/soft.jpg": "../cat/0.jpg",
        "train/dog/chain.jpg": "soft.jpg",
        "train/through.jpg": "owl/2.jpg",
        "train/cat/hidden.jpg": "../../.cache/x.jpg",
        "train/cat/gone.jpg": "nowhere",
        "train/cat/into_a_file.jpg": "0.jpg/x",
        "train/cat/a": "b",
        "train/cat/b": "a",
        "train/cat/up": "..",
        "train/cat/self": ".",
        "pool/owl/there": "../../train/cat",
        "train/cat/back": "../../pool/owl",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "train/cat/fifo.jpg")
    (Path(os.fsdecode(os.fsencode(root) + b"/train/cat/caf\xe9.jpg"))).write_bytes(b"Latin 1")
    return root


def test_a_folder_and_its_tar_have_the_same_entries(tree, tmp_path):
    subprocess.run(["tar", "-cf", tmp_path / "tree.tar", "-C", tree, "."], check=True)
    folder, tar = list_folder(str(tree)), listed(tmp_path / "tree.tar")
    assert content_of(folder, tmp_path) == content_of(tar, tmp_path)
    assert (folder.folders, folder.unusable) == (tar.folders, tar.unusable)
    same = [
        "train/cat/0.jpg",
        "train/dog/chain.jpg",
        "train/dog/hard.jpg",
        "train/dog/soft.jpg",
        "pool/owl/there/0.jpg",
    ]
    assert {folder.files[name].size for name in same} == {1500}
    assert {
        "train/owl/2.jpg",
        "train/owl/deep/3.jpg",
        "train/through.jpg",
        "train/cat/hidden.jpg",
    } < folder.files.keys()
    assert content_of(folder, tmp_path)["train/cat/caf\\xe9.jpg"] == b"Latin 1"
    reasons = dict(folder.unusable)
    assert {reasons[f"train/cat/{name}"] for name in ("a", "b", "up", "self", "back/there")} == {CIRCLE}
    assert {reasons[f"train/cat/{name}.jpg"] for name in ("gone", "into_a_file")} == {NOTHING}
    assert (reasons["train/cat/fifo.jpg"], reasons[".cache"], reasons["train/cat/.DS_Store"]) == (
        SPECIAL,
        HIDDEN,
        HIDDEN,
    )


def test_local_links_may_lead_out_of_the_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.jpg").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/all").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/one.jpg").symlink_to("../elsewhere/x.jpg")
    (tmp_path / "root/above").symlink_to("..")
    contents = list_folder(str(tmp_path / "root"))
    assert contents.files.keys() == {"all/x.jpg", "one.jpg"}
    assert contents.unusable == (("above", CIRCLE),)


def test_a_folder_that_may_not_be_listed_is_named_unless_it_is_hidden(tmp_path, monkeypatch):
    for name in ("owl", ".Trash", "lost+found"):
        (tmp_path / name).mkdir()
    allowed = os.scandir

    def scandir(path):
        if Path(path) != tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return allowed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"owl: cannot be listed \(Permission denied\): give the right"):
        list_folder(str(tmp_path))
    (tmp_path / "owl").rmdir()
    assert list_folder(str(tmp_path)).unusable == ((".Trash", HIDDEN), ("lost+found", HIDDEN))


def test_a_file_that_may_not_be_read_is_unusable(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(b"x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert list_folder(str(tmp_path)).unusable == (("x.jpg", UNREADABLE),)


@pytest.mark.parametrize(
    ("members", "files", "unusable"),
    [
        ([("a", b"1"), ("b", "1a")], {"a": b"1", "b": b"1"}, ()),  # a hard link
        ([("./a", b"1"), ("d/b", "1./a")], {"a": b"1", "d/b": b"1"}, ()),
        ([("a", b"1"), ("a", "1a")], {"a": b"1"}, ()),  # GNU tar writes this if it is given a file twice
        # A hard link to a symbolic link
        ([("a", b"1"), ("b", "2a"), ("c", "1b")], {"a": b"1", "b": b"1", "c": b"1"}, ()),
        ([("b", "2d/../a"), ("a", b"1"), ("d", "5")], {"a": b"1", "b": b"1"}, ()),  # to a later member
        ([("b", "1a"), ("a", b"1")], {"a": b"1", "b": b"1"}, ()),
        ([("a", "1gone")], {}, (("a", NOTHING),)),
        ([("a", "2gone")], {}, (("a", NOTHING),)),
        ([("a", "2/etc/passwd")], {}, (("a", OUTSIDE),)),
        ([("d/a", "2../../x"), ("x", b"1")], {"x": b"1"}, (("d/a", OUTSIDE),)),
        ([("a", "1a")], {}, (("a", CIRCLE),)),
        ([("a", "2d"), ("d", "2a")], {}, (("a", CIRCLE), ("d", CIRCLE))),
        ([("a", "3"), ("b", "6")], {}, (("a", SPECIAL), ("b", SPECIAL))),  # a device and a queue
        ([("a", b"1"), ("b", b"2"), ("./a", b"3")], {"a": b"3", "b": b"2"}, (("a", REPLACED),)),
        ([("__MACOSX/a", b""), ("__MACOSX/b", b""), ("a", b"1")], {"a": b"1"}, (("__MACOSX", HIDDEN),)),
        # Harmless, because members are read in the tar and never unpacked
        ([("../a", b"1"), ("/b", b"2")], {"../a": b"1", "b": b"2"}, ()),
    ],
)
def test_members_of_tars(tmp_path, members, files, unusable):
    contents = listed(tar_of(tmp_path / "some.tar", members))
    assert content_of(contents, tmp_path) == files
    assert contents.unusable == unusable


@pytest.mark.parametrize(
    "form", ["gnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax --sparse-version=1.0"]
)
def test_sparse_members_have_their_holes(tmp_path, form):
    parts = {"a.bmp": (b"head", b"tail"), "b.bmp": (b"", b""), "c.bmp": (b"dense", b"")}
    content = {}
    for name, (head, tail) in parts.items():
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            if name != "c.bmp":
                file.truncate(len(head) + (1 << 17))  # a hole
                file.seek(0, os.SEEK_END)
            file.write(tail)
        content[name] = (tmp_path / name).read_bytes()
    options = ["--hole-detection=raw", *f"--format={form}".split(), "-C", tmp_path]
    subprocess.run(["tar", "-Scf", tmp_path / "some.tar", *options, *content], check=True)
    assert (tmp_path / "some.tar").stat().st_size < 1 << 16
    assert content_of(listed(tmp_path / "some.tar"), tmp_path) == content


def test_a_sparse_member_that_would_fill_the_disk_is_left_out(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    subprocess.run(["tar", "-Scf", tmp_path / "some.tar", "-C", tmp_path, "huge"], check=True)
    assert listed(tmp_path / "some.tar").unusable == (("huge", SPECIAL),)
    assert not (tmp_path / "some.expanded").exists()


@pytest.mark.parametrize("padding", [0, 20])
def test_tars_joined_by_cat_are_one(tmp_path, padding):
    joined = [tar_of(tmp_path / name, [(name, name.encode())]).read_bytes() for name in "abc"]
    (tmp_path / "all.tar").write_bytes((bytes(512 * padding)).join(joined) + b"junk")
    assert content_of(listed(tmp_path / "all.tar"), tmp_path) == {name: name.encode() for name in "abc"}
    (tmp_path / "cut.tar").write_bytes(b"".join(joined)[: len(joined[0]) + 700])
    with pytest.raises(DataError, match=r"^source: (the tar has no end|not a whole tar)"):
        listed(tmp_path / "cut.tar")


def test_a_damaged_header_is_one_line(tmp_path):
    path = tar_of(tmp_path / "some.tar", [(name, b"x" * 600) for name in "abc"])
    whole = path.read_bytes()
    for place in range(512, 4096, 37):
        path.write_bytes(whole[:place] + b"\xff\xfe" + whole[place + 2 :])
        said = ""
        try:
            names = listed(path).files.keys()
        except DataError as error:
            said = str(error)
        # The damage may also lie in the content of a member, which listing does not read.
        assert re.fullmatch(r"source: .*", said) or names == {"a", "b", "c"}


def zip_of(path: Path, entries: list[tuple[zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for entry, content in entries:
            file.writestr(entry, content)
    to_tar(path, path.with_suffix(".tar"), progress=False)
    return path.with_suffix(".tar")


def entry_of(name: str, mode: int = stat.S_IFREG | 0o644, system: int = 3) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("name")
    entry.filename, entry.external_attr, entry.create_system = name, mode << 16, system
    return entry


def test_links_in_zips_are_followed(tmp_path):
    link = stat.S_IFLNK | 0o777
    entries = [
        (entry_of("d/a"), b"1"),
        (entry_of("b", link), b"d/a"),
        (entry_of("e", link), b"d"),
        (entry_of("c", link), b"gone"),
    ]
    contents = listed(zip_of(tmp_path / "some.zip", entries))
    assert content_of(contents, tmp_path) == {"d/a": b"1", "b": b"1", "e/a": b"1"}
    assert contents.unusable == (("c", NOTHING),)


def test_names_of_windows_and_names_that_come_twice_in_zips(tmp_path):
    entries = [
        (entry_of("train\\cat\\1.jpg", system=0), b"1"),
        (entry_of("a\\b"), b"2"),
        (entry_of("x"), b"3"),
        (entry_of("x"), b"4"),
    ]
    with pytest.warns(UserWarning, match="Duplicate name"):
        contents = listed(zip_of(tmp_path / "some.zip", entries))
    assert content_of(contents, tmp_path) == {"train/cat/1.jpg": b"1", "a\\b": b"2", "x": b"4"}
    assert contents.unusable == (("x", REPLACED),)


def test_names_that_are_not_text_are_escaped_and_two_of_one_text_are_told(tmp_path):
    assert as_text("naïve 図.jpg") == "naïve 図.jpg"
    assert as_text(os.fsdecode(b"caf\xe9\n\x1b.jpg")) == "caf\\xe9\\n\\x1b.jpg"
    members: Members = [(os.fsdecode(b"caf\xe9"), b"1"), ("caf\\xe9", b"2"), ("two\nlines", b"3")]
    contents = listed(tar_of(tmp_path / "some.tar", members))
    assert contents.files.keys() == {"caf\\xe9", "two\\nlines"}
    assert contents.unusable == (("caf\\xe9", REPLACED),)
