"""Brings the shards of a rank to this machine before its loader processes want them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from queue import SimpleQueue
from threading import Thread

import numpy as np

from pipelines.data.shards.cache import local_copy
from pipelines.data.shards.manifest import Shard


class Prefetcher:
    """A thread that copies remote shards into the cache, one at a time, in the order in which the batches of a rank need them.

    It keeps one shard ahead of what the rank's loader processes may be reading, and leaves out what the cache has no room for.

    Args:
        root: URL of the shards.
        order: (first batch that needs it, shard), ascending by batch.
        ahead: batches that loader processes may read before an earlier one is taken.
    """

    def __init__(self, root: str, order: Sequence[tuple[int, Shard]], ahead: int) -> None:
        self._root, self._left, self._ahead = root, deque(order), ahead
        self._last = -1  # batch that needs the last shard that was asked for
        self._asked: SimpleQueue[Shard | None] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._bring, daemon=True)
        self._thread.start()

    def reach(self, batch: int) -> None:
        """Asks for the shards of the batches that may be read once `batch` is, and for one more."""
        while self._left and self._last <= batch + self._ahead:
            self._last, shard = self._left.popleft()
            self._asked.put(shard)

    def close(self) -> None:
        """Ends the thread after the download that it has begun."""
        self._closed = True
        self._asked.put(None)

    def _bring(self) -> None:
        while (shard := self._asked.get()) is not None and not self._closed:
            with suppress(Exception):  # a reader meets it, too, and says so
                local_copy(self._root, shard, patience=0.0)


def first_needs(shards: Sequence[Shard], batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, Shard]]:
    """Each shard that `batches` of sample numbers need, with the first batch that needs it, ascending by batch."""
    ends, seen = list(accumulate(shard.count for shard in shards)), set()
    for batch, numbers in enumerate(batches):
        for place in dict.fromkeys(np.searchsorted(ends, numbers, side="right").tolist()):
            if place not in seen:
                seen.add(place)
                yield batch, shards[place]
