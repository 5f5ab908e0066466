"""How a stage starts and fails: its params, errors in one line, and no secret of an address in what it prints."""

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
    """Yields the params of a stage; an error that the user can mend ends the stage with one line, not a traceback.

    What is printed meanwhile, by libraries and from workers too, is redacted, and so is the traceback of any other error.
    """
    with redirect_stdout(_Redacting(sys.stdout)), redirect_stderr(_Redacting(sys.stderr)):
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("aiobotocore").setLevel(
            logging.WARNING
        )  # logs where it found credentials each time
        sys.excepthook = _print_redacted
        try:
            yield load()
        except (UserError, FileNotFoundError) as error:
            sys.exit(redacted(str(error)))


class _Redacting:
    """A stream that redacts each text written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_redacted(*error: Any) -> None:
    """Prints an error that ends the process as Python does, redacted."""
    print(redacted("".join(traceback.format_exception(*error))), end="", file=sys.stderr)
