"""A well-known file of each origin, read when the first link of that origin comes, and kept for a while."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from curation.crawl.urls import WebUrl

T = TypeVar("T")


class OriginFiles(Generic[T]):
    """What a file says, for the origins visited so far.

    Args:
        load: Reads and parses the file of an origin, given any URL of it; returns what it says and for how many seconds
            that holds. Must not raise.
        weight: Memory of a value, in any unit.
        max_weight: What is kept in all, in the same unit; the least recently used go first.
    """

    MAX_ENTRIES = 5_000

    def __init__(
        self, load: Callable[[WebUrl], Awaitable[tuple[T, float]]], weight: Callable[[T], int], max_weight: int
    ) -> None:
        self._load = load
        self._weight = weight
        self._max_weight = max_weight
        self._total = 0
        self._kept: OrderedDict[str, tuple[float, T]] = OrderedDict()
        self._running: dict[str, asyncio.Task[T]] = {}

    async def get(self, url: WebUrl) -> T:
        """Return what the file of the origin of ``url`` says; one read serves all who ask meanwhile."""
        kept = self._kept.get(url.origin)
        if kept is not None and kept[0] > time.monotonic():
            self._kept.move_to_end(url.origin)
            return kept[1]
        task = self._running.get(url.origin)
        if task is None:
            # A task of its own: the link that asked first may meet its deadline while others still wait.
            task = self._running[url.origin] = asyncio.create_task(self._read(url))
        return await asyncio.shield(task)

    def known(self, url: WebUrl) -> T | None:
        """Return what ``get`` returned last, without reading anything; None where that is forgotten."""
        kept = self._kept.get(url.origin)
        return None if kept is None else kept[1]

    async def close(self) -> None:
        """Stop what is still being read."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, url: WebUrl) -> T:
        try:
            value, ttl_s = await self._load(url)
        finally:
            self._running.pop(url.origin, None)
        self._forget(url.origin)
        self._kept[url.origin] = (time.monotonic() + ttl_s, value)
        self._total += self._weight(value)
        while len(self._kept) > 1 and (len(self._kept) > self.MAX_ENTRIES or self._total > self._max_weight):
            self._forget(next(iter(self._kept)))
        return value

    def _forget(self, origin: str) -> None:
        entry = self._kept.pop(origin, None)
        if entry is not None:
            self._total -= self._weight(entry[1])
