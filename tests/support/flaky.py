"""A remote file system, `flaky://`, that fails as often and as long as a test says; what it holds is `memory://`'s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

CALLS = ("get_file", "put_file", "cat_file", "exists")


class FlakyFileSystem(MemoryFileSystem):
    """Memory, each of whose `CALLS` takes the next of `troubles` and raises it if it is an error."""

    protocol = "flaky"
    cachable = False
    troubles: Iterator[Exception | None] = iter(())
    asked = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def meet(self) -> None:
        """The next trouble."""
        FlakyFileSystem.asked += 1
        if trouble := next(FlakyFileSystem.troubles, None):
            raise trouble


def troubled(name: str) -> Any:
    """The call `name` of memory, after its trouble."""

    def call(self: FlakyFileSystem, *args: Any, **kwargs: Any) -> Any:
        self.meet()
        return getattr(MemoryFileSystem, name)(self, *args, **kwargs)

    return call


for each in CALLS:
    setattr(FlakyFileSystem, each, troubled(each))
fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
