"""Errors of storage, and any error in one line."""

from __future__ import annotations

from pipelines.errors import UserError, redacted

_LONGEST = 300  # characters


class StorageError(UserError, OSError):
    """A storage that cannot be reached, read or written: one line that names the place and the cause."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class DamagedFileError(UserError, ValueError):
    """A file of this project that cannot be read as what it is, such as one that a crash has cut: one line that names it."""


def one_line(error: object) -> str:
    """The redacted text of an error in one line of at most 300 characters; its type, if it has no text."""
    return " ".join(redacted(str(error)).split())[:_LONGEST] or type(error).__name__
