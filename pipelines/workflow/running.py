"""How a stage starts and fails: its params, and errors in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import UserError
from pipelines.params import Params, load


@contextmanager
def stage() -> Iterator[Params]:
    """Yields the params of a stage; an error that the user can mend ends the stage with one line, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # logs where it found credentials each time
    try:
        yield load()
    except (UserError, FileNotFoundError) as error:
        sys.exit(str(error))
