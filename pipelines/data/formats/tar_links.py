"""Resolves links between the entries of a tar, as a file system would after unpacking."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipelines.data.formats.archive import CIRCLE, NOTHING, OUTSIDE, Listing, Member

_MOST_HOPS = 40  # links on the way to one file, as in Linux


@dataclass(frozen=True, slots=True)
class Link:
    """A link to `target`, a path from the link's folder (symbolic link) or from the root (hard link)."""

    target: str
    from_root: bool = False


# A file, a link, the reason why an entry is unusable, or None for a folder
Entry = Member | Link | str | None


def add_entries(entries: Mapping[str, Entry], found: Listing) -> None:
    """Adds the entries of an archive to `found`; a link is added as the file or folder that it leads to."""
    links = _Links(entries, found)
    for path, entry in entries.items():
        links.add(path, path, entry, ())


class _Links:
    """Adds the entries of an archive, one by one, to `found`."""

    def __init__(self, entries: Mapping[str, Entry], found: Listing) -> None:
        self._entries, self._found = entries, found
        self._paths = sorted(entries) if any(isinstance(entry, Link) for entry in entries.values()) else []

    def add(self, shown: str, path: str, entry: Entry, through: tuple[str, ...]) -> None:
        """Adds the entry at `path` under the path `shown`; `through` are the links that led to it."""
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
        """Adds the target of the last of `links` as `shown`, with the entries below it if it is a folder.

        `links` are the paths of the links followed so far: each one lies in the folder that the link before
        leads to.
        """
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
        """Yields the paths of the entries in `folder`, at any depth."""
        for number in range(bisect_left(self._paths, f"{folder}/"), len(self._paths)):
            if not self._paths[number].startswith(f"{folder}/"):
                return
            yield self._paths[number]

    def _resolved(self, path: str) -> str:
        """`path` with all links resolved; raises `_BrokenError` if it leaves the archive or is circular."""
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
    """A link leads to no file or folder of the archive; the error's text is the reason."""
