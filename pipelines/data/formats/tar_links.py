"""Links in an archive, followed within the archive as a file system follows them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipelines.data.formats.archive import CIRCLE, NOTHING, OUTSIDE, Listing, Member

_MOST_HOPS = 40  # links on the way to one file, as in Linux


@dataclass(frozen=True, slots=True)
class Link:
    """A link to `target`, a path from the folder of the link (a symbolic link) or from the root (a hard link)."""

    target: str
    from_root: bool = False


Entry = Member | Link | str | None  # why it is not usable, or None for a folder


def add_entries(entries: Mapping[str, Entry], found: Listing) -> None:
    """Adds the entries of an archive, by path, to `found`; links as the files and folders that they lead to."""
    links = _Links(entries, found)
    for path, entry in entries.items():
        links.add(path, path, entry, ())


class _Links:
    """The entries of an archive, which are added to `found` one by one."""

    def __init__(self, entries: Mapping[str, Entry], found: Listing) -> None:
        self._entries, self._found = entries, found
        self._paths = sorted(entries) if any(isinstance(entry, Link) for entry in entries.values()) else []

    def add(self, shown: str, path: str, entry: Entry, through: tuple[str, ...]) -> None:
        """Adds the entry at `path` as `shown`; `through` are the paths of the links that led to it."""
        if isinstance(entry, Member):
            self._found.file(shown, entry)
        elif entry is None:
            self._found.folder(shown)
        elif isinstance(entry, str):
            self._found.unusable(shown, entry)
        else:
            try:
                self._follow(shown, (*through, path))
            except _BrokenError as error:
                self._found.unusable(shown, str(error))

    def _follow(self, shown: str, links: tuple[str, ...]) -> None:
        """Adds what the last one of `links`, each of which is in the folder that the one before led to, leads to."""
        target = self._resolved(links[-1])
        if any(f"{link}/".startswith(f"{target}/") for link in links) or not target:
            raise _BrokenError(CIRCLE)
        entry = self._entries.get(target)
        below = list(self._below(target))
        if entry is None and not below and target not in self._entries:
            raise _BrokenError(NOTHING)
        self.add(shown, target, entry, links)
        for path in below:
            self.add(shown + path.removeprefix(target), path, self._entries[path], links)

    def _below(self, folder: str) -> Iterator[str]:
        """The paths of the entries in `folder`, at any depth."""
        for number in range(bisect_left(self._paths, f"{folder}/"), len(self._paths)):
            if not self._paths[number].startswith(f"{folder}/"):
                return
            yield self._paths[number]

    def _resolved(self, path: str) -> str:
        """`path` without links in it; raises `_BrokenError` if it leads out of the archive or in a circle."""
        left, done, hops = deque(path.split("/")), list[str](), 0
        while left:
            part = left.popleft()
            if part == ".." and not done:
                raise _BrokenError(OUTSIDE)
            if part == "..":
                done.pop()
            elif part not in ("", "."):
                entry = self._entries.get("/".join((*done, part)))
                if not isinstance(entry, Link):
                    done.append(part)
                    continue
                hops += 1
                if hops > _MOST_HOPS:
                    raise _BrokenError(CIRCLE)
                if entry.target.startswith("/"):
                    raise _BrokenError(OUTSIDE)
                done = [] if entry.from_root else done
                left.extendleft(reversed(entry.target.split("/")))
        return "/".join(done)


class _BrokenError(Exception):
    """A link that leads to no file and no folder of the archive; its text is the reason."""
