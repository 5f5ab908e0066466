"""Counts the items of a data set that do not become samples, by reason."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger(__name__)


class LeftOut:
    """Counts the items that a source leaves out, by reason, and keeps one name per reason.

    Attributes:
        counts: number of items left out, by reason. A reason is a plural noun, such as `empty boxes`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts the item `name` under `reason`."""
        self.counts[reason] += 1
        self._first.setdefault(reason, name)

    def log(self, source: str) -> None:
        """Logs one line per reason: the number of items of `source` left out, and the first one's name."""
        for reason, count in sorted(self.counts.items()):
            log.warning("%s: left out: %d %s, such as %s", source, count, reason, self._first[reason])
