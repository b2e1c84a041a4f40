"""Which link is next: hosts take turns, and none has more than its share of requests at a time."""

import asyncio
from collections import deque
from collections.abc import Iterable


class HostTurns:
    """Hand out link numbers so that no host is asked for more than ``per_host`` at a time.

    Args:
        hosts: Host of each link, in order.
        per_host: Links of one host that may be out at a time.
    """

    def __init__(self, hosts: Iterable[str], per_host: int) -> None:
        self._waiting: dict[str, deque[int]] = {}
        for number, host in enumerate(hosts):
            self._waiting.setdefault(host, deque()).append(number)
        self._free = dict.fromkeys(self._waiting, per_host)
        self._ready = deque(self._waiting)  # hosts with links waiting and a free place
        self._left = sum(map(len, self._waiting.values()))
        self._changed = asyncio.Condition()

    async def take(self) -> tuple[int, str] | None:
        """Return the next link and its host; wait for a free place; None when all were handed out."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready or not self._left)
            if not self._ready:
                return None
            host = self._ready.popleft()
            number = self._waiting[host].popleft()
            self._left -= 1
            self._free[host] -= 1
            if self._waiting[host] and self._free[host]:
                self._ready.append(host)
            if not self._left:
                self._changed.notify_all()
            return number, host

    async def give_back(self, host: str) -> None:
        """Free the place of a link that ``take`` handed out."""
        async with self._changed:
            self._free[host] += 1
            if self._free[host] == 1 and self._waiting[host]:
                self._ready.append(host)
                self._changed.notify()
