"""Simulated crashes: the files that a crash would leave, for each of a process's changes in a folder.

A killed process leaves everything that it has written, also a part of a write. A machine that loses power
also loses unsynced content, and the names of files in unsynced folders.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Place:
    """The content of the folder after one possible crash."""

    before: str  # the operation that the crash prevents
    kind: str  # "kill" or "power"
    content: dict[str, bytes]  # path -> content of the file
    folders: frozenset[str]

    def __str__(self) -> str:
        return f"{self.kind} before {self.before}"

    def restore(self, folder: Path) -> None:
        """Puts the files into an empty folder."""
        for name in self.folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, content in self.content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


class Disk:
    """Records in `places` what a crash would leave at each change that the block makes below `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.places = root, list[Place]()
        # Inode of a file with unsynced content -> its content on the disk.
        self._synced: dict[int, bytes] = {}
        # Path of a file in an unsynced folder -> content that the disk has under this name, `None` without
        # the name.
        self._names: dict[Path, bytes | None] = {}

    def __enter__(self) -> Disk:
        self.root.mkdir(parents=True, exist_ok=True)
        self._patches = ExitStack()
        opened = builtins.open
        for module in (builtins, io):
            self._patches.enter_context(mock.patch.object(module, "open", partial(self._open, opened)))
        for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
            self._patches.enter_context(mock.patch.object(os, name, self._watched(name, getattr(os, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        self._take("end")

    def _here(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """Returns the absolute path (of a path or file descriptor) if it is the root or below it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = Path(os.path.abspath(path))
        return path if path == self.root or self.root in path.parents else None

    def _open(self, opened: Any, file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        """Replaces `open`: watches files that are opened for writing."""
        path = None if isinstance(file, int) else self._here(file)
        if path is None or not set(mode) & set("wax+"):
            return opened(file, mode, *args, **more)
        self._take(f"open {path.name}")
        before = path.read_bytes() if path.exists() else None
        real = opened(file, mode, *args, **more)
        inode = os.fstat(real.fileno()).st_ino
        if before is None:
            self._synced[inode] = b""  # overwrites the entry of a deleted file with the same inode
            self._names.setdefault(path, None)
        else:
            self._synced.setdefault(inode, before)
        return _File(real, path, self)

    def _watched(self, name: str, call: Any) -> Any:
        """Wraps a function of `os`: a crash may come before each call."""

        def watched(path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> Any:
            here = self._here(path, dir_fd)
            options = more if dir_fd is None else {**more, "dir_fd": dir_fd}
            if here is None:
                return call(path, *args, **options)
            self._take(f"{name} {here.name}")
            target = Path(os.path.abspath(args[0])) if name in ("replace", "rename") else here
            before = target.read_bytes() if target.is_file() else None
            value = None if name == "fsync" else call(path, *args, **options)
            if name == "fsync" and here.is_dir():
                self._names = {each: content for each, content in self._names.items() if each.parent != here}
            elif name == "fsync":
                self._synced.pop(here.stat().st_ino, None)
            elif name in ("replace", "rename", "mkdir"):
                self._names.setdefault(target, before)
                self._names.pop(here, None) if target != here else None
            else:
                self._names.pop(here, None)
            return value

        return watched

    def _take(self, before: str) -> None:
        """Records what a kill and a loss of power would leave now."""
        paths = list(self.root.rglob("*"))
        folders = {path for path in paths if path.is_dir()}
        kill = {path: path.read_bytes() for path in paths if path not in folders}
        power = {path: self._synced.get(path.stat().st_ino, content) for path, content in kill.items()}
        left = set(folders)
        for lost, content in self._names.items():
            if content is not None:
                power[lost] = content
            else:
                power = {
                    path: value for path, value in power.items() if path != lost and lost not in path.parents
                }
                left = {path for path in left if path != lost and lost not in path.parents}
        for kind, found, there in (("kill", kill, folders), ("power", power, left)):
            named = {str(path.relative_to(self.root)): content for path, content in found.items()}
            self.places.append(
                Place(before, kind, named, frozenset(str(path.relative_to(self.root)) for path in there))
            )


class _File:
    """A file opened for writing. A crash may come after each quarter of a write."""

    def __init__(self, file: Any, path: Path, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, content: Any) -> int:
        cuts = [len(content) * quarter // 4 for quarter in range(5)]
        for start, end in pairwise(cuts):
            self._file.write(content[start:end])
            self._file.flush()
            self._disk._take(f"write {self._path.name}")
        return len(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
