"""How a stage starts and fails: it reads the params, reports errors in one line, redacts its output."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from pipelines.errors import UserError, redacted
from pipelines.params import Params, load


@contextmanager
def stage() -> Iterator[Params]:
    """Yields the params of a stage. An error that the user can mend ends the process with one line.

    Other errors end it with a traceback. Everything printed in the block, also by libraries and workers, is
    redacted, and so is the traceback.
    """
    with redirect_stdout(_Redacting(sys.stdout)), redirect_stderr(_Redacting(sys.stderr)):
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        # At INFO, aiobotocore logs where it found credentials, each time.
        logging.getLogger("aiobotocore").setLevel(logging.WARNING)
        sys.excepthook = _print_redacted
        try:
            yield load()
        except (UserError, FileNotFoundError) as error:
            sys.exit(redacted(str(error)))


class _Redacting:
    """A stream that removes the secrets of addresses from each text written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_redacted(*error: Any) -> None:
    """Prints the traceback of an error that ends the process, redacted."""
    print(redacted("".join(traceback.format_exception(*error))), end="", file=sys.stderr)
