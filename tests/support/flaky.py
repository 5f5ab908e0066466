"""The remote file system `flaky://`: that of `memory://`, with the errors that a test lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

CALLS = ("get_file", "put_file", "cat_file", "exists")


class FlakyFileSystem(MemoryFileSystem):
    """A memory file system. Each of its `CALLS` raises the next of `troubles` unless it is `None`."""

    protocol = "flaky"
    cachable = False
    troubles: Iterator[Exception | None] = iter(())
    asked = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def meet(self) -> None:
        """Raises the next of `troubles`, if it is an error."""
        FlakyFileSystem.asked += 1
        if trouble := next(FlakyFileSystem.troubles, None):
            raise trouble


def troubled(name: str) -> Any:
    """Returns the method `name` of the memory file system, which first raises the next trouble."""

    def call(self: FlakyFileSystem, *args: Any, **kwargs: Any) -> Any:
        self.meet()
        return getattr(MemoryFileSystem, name)(self, *args, **kwargs)

    return call


for each in CALLS:
    setattr(FlakyFileSystem, each, troubled(each))
fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
