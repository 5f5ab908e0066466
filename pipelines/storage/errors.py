"""Errors of storage, and the text of any error in one line."""

from __future__ import annotations

from pipelines.errors import UserError, redacted

_LONGEST = 300  # characters


class StorageError(UserError, OSError):
    """A storage cannot be reached, read or written. The message is one line with the place and the cause."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class DamagedFileError(UserError, ValueError):
    """A file of this project is damaged, for example truncated by a crash. The message is one line."""


def one_line(error: object) -> str:
    """The text of an error, redacted, in one line of at most 300 characters; its type if it has no text."""
    return " ".join(redacted(str(error)).split())[:_LONGEST] or type(error).__name__
