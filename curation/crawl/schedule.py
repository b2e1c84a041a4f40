"""Which link is next: hosts take turns, and none is asked faster, or by more at a time, than it may be.

A link that waits for its host (for its next turn, for the end of a pause that it asked for, for another attempt) waits
here and takes nothing that other hosts could use. Each request is a turn of the host that it goes to, redirects and
further attempts too.

Hosts are opened as needed: while one that is open may be asked, no other is begun, so that connections, names and
robots.txt are used while they are at hand. The links of a host come in a seeded random order, because neighbours in a
list are alike: a folder of dead links does not come all at once and look like a dead host.

Shards that share a host ask it in turn, each in its own slots of the time of day, so that its rate holds for all of
them at any moment and not on average only.

A host that gives no answer many times in a row is left alone for a while, then tried with one link. After
``MAX_TRIALS`` of these in vain its links are handed out with a reason, for nobody to request them. One that says
"too many requests" is treated the same way, with the pause that it asks for. A failure tells something about a host
only if the host has not answered anything since that request began: where slow and good links are mixed, slow ones end
together.
"""

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from curation.config.fetch import FetchConfig
from curation.errors import LinkError

MAX_TRIALS = 3
_REFUSALS = 5  # in a row; one may belong to a single URL
_SEED = 0


@dataclass(slots=True, eq=False)
class Host:
    """A host with links that are not finished.

    Attributes:
        name: Host and port.
        share: Shards of the run that ask it too; each has that part of its rate and concurrency.
        slot: Which of them this one is.
    """

    name: str
    share: int
    slot: int
    begin: int  # of what was never handed out: a range of the order of links
    end: int
    left: int  # links that are not finished
    interval_s: float
    places: int  # requests at a time
    next_at: float = 0.0
    paused_until: float = 0.0
    busy: int = 0
    is_known: bool = False  # what its robots.txt asks for; until then one request goes at a time
    is_queued: bool = False
    again: list[tuple[float, int]] = field(default_factory=list)  # a heap of (when, link)
    answered_at: float = 0.0
    silences: int = 0
    refusals: int = 0
    trials: int = 0  # pauses since the last answer; while there are any, one request goes at a time
    given_up: LinkError | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A link to request now.

    Attributes:
        link: Its number.
        host: Whose turn it is.
        refusal: Why it is not to be requested; None: it is.
        started: When, on the schedule's clock.
    """

    link: int
    host: Host
    refusal: LinkError | None
    started: float


class Schedule:
    """Turns of hosts; to be used in one event loop.

    Args:
        hosts: Host of each link, in order.
        shares: Shards that share the host of each link.
        slots: Which of these this one is, for each link; is taken modulo their number.
        config: Limits.
        clock: Seconds, never going back.
        time_of_day: Seconds, the same for all shards.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        shares: Sequence[int],
        slots: Sequence[int],
        config: FetchConfig,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._clock = clock
        self._epoch = clock() - time_of_day()
        self._shares, self._slots = shares, slots
        self._groups: dict[str, int] = {}  # hosts that are not open yet
        numbers = np.array([self._groups.setdefault(host, len(self._groups)) for host in hosts], np.int64)
        shuffled = np.random.default_rng(_SEED).permutation(len(numbers))
        self._order = shuffled[np.argsort(numbers[shuffled], kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(self._groups)))])
        self._names = iter(list(self._groups))
        self._open: dict[str, Host] = {}
        self._ready: deque[Host] = deque()
        self._later: list[tuple[float, int, Host]] = []
        self._tie = count()
        self._left = len(numbers)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> Turn | None:
        """Return the next turn, and wait for it; None when all links are finished."""
        while self._left:
            turn = self._next()
            if turn is not None:
                if self._ready:
                    self._wake()
                elif self._waiters:
                    self._set_timer()
                return turn
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            self._set_timer()
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # whoever is next: this one may just have been woken
                raise
        return None

    def finish(self, turn: Turn) -> None:
        """The link is done with."""
        self._leave(turn)
        self._left -= 1
        if not self._left:
            self._wake(all_of_them=True)

    def again(self, turn: Turn, delay_s: float) -> None:
        """The link wants another turn of the same host, after ``delay_s``."""
        heapq.heappush(turn.host.again, (self._clock() + delay_s, turn.link))
        turn.host.left += 1
        self._leave(turn)

    def move(self, turn: Turn, name: str) -> None:
        """The link wants a turn of another host, to which it was redirected."""
        host = self._host(name, turn.host.share, turn.host.slot)
        heapq.heappush(host.again, (self._clock(), turn.link))
        host.left += 1
        self._leave(turn)
        self._queue(host)

    def known(self, host: Host, crawl_delay_s: float) -> None:
        """The host's robots.txt is known; it asks for so many seconds between two requests, of all shards together."""
        wanted_s = min(crawl_delay_s, self._config.max_crawl_delay_s) * host.share
        if wanted_s > host.interval_s:
            wait_s, host.interval_s = wanted_s - host.interval_s, wanted_s
            host.next_at = self._slot_at(host, host.next_at + wait_s)
        if not host.is_known:
            host.is_known = True
            self._queue(host)

    def answered(self, host: Host) -> None:
        """The host has answered a request, whatever it said."""
        host.silences = host.refusals = host.trials = 0
        host.answered_at = self._clock()

    def silent(self, turn: Turn, reason: str) -> None:
        """A request came to no answer."""
        host = turn.host
        if turn.started < host.answered_at:
            return
        host.silences += 1
        if host.silences >= self._config.host_failures or host.trials:
            self._pause(turn, self._trial_pause_s(host), "host_down", reason)

    def refused(self, turn: Turn, wait_s: float, reason: str) -> None:
        """The host has answered that it gets too many requests, and asks for a pause."""
        host = turn.host
        host.silences = 0
        if turn.started < host.answered_at:
            return
        host.refusals += 1
        if wait_s > self._config.timeout_s and host.refusals >= _REFUSALS:
            self._give_up(host, "host_busy", f"{reason}, and it asks for {wait_s:.0f} s")
        elif host.refusals >= _REFUSALS or host.trials:
            self._pause(turn, max(min(wait_s, self._config.timeout_s), self._trial_pause_s(host)), "host_busy", reason)

    def _trial_pause_s(self, host: Host) -> float:
        return self._config.timeout_s / 8 * 2.0**host.trials

    def _pause(self, turn: Turn, pause_s: float, reason: str, last: str) -> None:
        host, now = turn.host, self._clock()
        if turn.started < host.paused_until:
            return  # it was under way when the pause began: it tells nothing new
        if host.trials == MAX_TRIALS:
            self._give_up(host, reason, f"left alone after many attempts, the last one: {last}")
            return
        host.trials += 1
        host.paused_until = now + pause_s
        host.next_at = max(host.next_at, host.paused_until)

    def _give_up(self, host: Host, reason: str, detail: str) -> None:
        host.given_up = LinkError(reason, detail)
        host.is_queued = True
        self._ready.append(host)  # it may stand in line for later as well, and have no links left by then
        self._wake()

    def _next(self) -> Turn | None:
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        while True:
            if not self._ready:
                if not self._open_next():
                    return None
                continue  # it may have to wait for its slot
            now = self._clock()  # not that of before: a host due since then would come back to this line for ever
            host = self._ready.popleft()
            host.is_queued = False
            if host.begin == host.end and not host.again:
                continue
            if self._due(host) > now:  # paused since it was queued
                self._queue(host)
                continue
            link = self._link_of(host, now)
            host.busy += 1
            if host.given_up is None:
                host.next_at = max(host.next_at, self._next_turn(host, now))
            self._queue(host)
            return Turn(link, host, host.given_up, now)

    def _next_turn(self, host: Host, now: float) -> float:
        """Return when a host may be asked again that is asked now: a little late, perhaps, for its slot."""
        early_s = host.interval_s / 2 if host.share > 1 else 0.0
        return self._slot_at(host, now + host.interval_s - early_s)

    def _slot_at(self, host: Host, at: float) -> float:
        """Return the first time from ``at`` on at which it is this shard's turn to ask."""
        if host.share == 1 or not host.interval_s:
            return at
        offset_s = host.interval_s * host.slot / host.share
        return at + (self._epoch + offset_s - at) % host.interval_s

    def _link_of(self, host: Host, now: float) -> int:
        if host.again and (host.again[0][0] <= now or host.begin == host.end):
            return heapq.heappop(host.again)[1]
        host.begin += 1
        return int(self._order[host.begin - 1])

    def _open_next(self) -> bool:
        """Open a host that was not asked yet; return whether there was one."""
        name = next((name for name in self._names if name in self._groups), None)
        if name is None:
            return False
        self._queue(self._host(name, 1, 0))
        return True

    def _host(self, name: str, share: int, slot: int) -> Host:
        host = self._open.get(name)
        if host is None:
            group = self._groups.pop(name, None)
            begin, end = (0, 0) if group is None else self._starts[group : group + 2].tolist()
            if end > begin:
                share = max(self._shares[int(link)] for link in self._order[begin:end])
                slot = self._slots[int(self._order[begin])] % share
            rate = self._config.host_requests_per_s
            interval_s = 0.0 if rate is None else share / rate
            places = max(1, self._config.host_concurrency // share)
            host = self._open[name] = Host(name, share, slot, begin, end, end - begin, interval_s, places)
            host.next_at = self._slot_at(host, self._clock())
        return host

    def _due(self, host: Host) -> float:
        """Return when a host may be asked next, where it has links and a place."""
        if host.given_up is not None:
            return 0.0
        return host.next_at if host.begin < host.end else max(host.next_at, host.again[0][0])

    def _queue(self, host: Host) -> None:
        """Put a host in line, if it has links waiting, and a place."""
        places = 1 if host.trials or not host.is_known else host.places
        if host.is_queued or (host.begin == host.end and not host.again):
            return
        if host.busy >= places and host.given_up is None:
            return
        host.is_queued = True
        due = self._due(host)
        if due <= self._clock():
            self._ready.append(host)
        else:
            heapq.heappush(self._later, (due, next(self._tie), host))
        self._wake()

    def _leave(self, turn: Turn) -> None:
        host = turn.host
        host.busy -= 1
        host.left -= 1
        host.is_known = True
        if host.left:
            self._queue(host)
        else:
            self._open.pop(host.name, None)

    def _wake(self, all_of_them: bool = False) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not all_of_them:
                    return

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._later:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, self._later[0][0] - self._clock()), self._wake)
