"""Downloads the shards of a rank before its loader processes read them."""

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
    """A thread that copies remote shards into the cache, one by one, in the order of their first use.

    It stays one shard ahead of the loader processes, and skips shards that the cache has no room for.

    Args:
        root: URL of the shards.
        order: pairs (first batch that needs the shard, shard), ascending by batch.
        ahead: number of batches that the loader processes may read ahead of the batch in use.
    """

    def __init__(self, root: str, order: Sequence[tuple[int, Shard]], ahead: int) -> None:
        self._root, self._left, self._ahead = root, deque(order), ahead
        self._last = -1  # first batch that needs the last requested shard
        self._asked: SimpleQueue[Shard | None] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._bring, daemon=True)
        self._thread.start()

    def reach(self, batch: int) -> None:
        """Requests the shards of all batches up to `batch + ahead`, and one shard more."""
        while self._left and self._last <= batch + self._ahead:
            self._last, shard = self._left.popleft()
            self._asked.put(shard)

    def close(self) -> None:
        """Ends the thread once its current download is complete."""
        self._closed = True
        self._asked.put(None)

    def _bring(self) -> None:
        while (shard := self._asked.get()) is not None and not self._closed:
            with suppress(Exception):  # the reader meets the same error and raises it
                local_copy(self._root, shard, patience=0.0)


def first_needs(shards: Sequence[Shard], batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, Shard]]:
    """Yields (first batch that needs it, shard) for all shards that `batches` of sample numbers need."""
    ends, seen = list(accumulate(shard.count for shard in shards)), set()
    for batch, numbers in enumerate(batches):
        for place in dict.fromkeys(np.searchsorted(ends, numbers, side="right").tolist()):
            if place not in seen:
                seen.add(place)
                yield batch, shards[place]
