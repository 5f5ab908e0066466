"""What a data set has and its samples lack: counted by reason, and named."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger(__name__)


class LeftOut:
    """Counts what is left out of a data set, by reason, and keeps the name of the first thing of each reason.

    Attributes:
        counts: numbers of things left out, by reason: a plural, such as `empty boxes`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts the thing called `name`."""
        self.counts[reason] += 1
        self._first.setdefault(reason, name)

    def log(self, source: str) -> None:
        """Logs one line for each reason: how many things of `source` were left out, and which was the first."""
        for reason, count in sorted(self.counts.items()):
            log.warning("%s: left out: %d %s, such as %s", source, count, reason, self._first[reason])
