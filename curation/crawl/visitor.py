"""Many URLs to what a check makes of their answers, politely and at the same time.

An event loop in a thread of its own requests; a few threads check what arrives; the caller iterates. Memory is bounded:
a URL is only started when a place is free, and its place is freed when the caller has taken its result.

The deadline of a URL counts what is done for it, from the name look-up to the last byte, with redirects and further
attempts. Waiting for its host's turn is not in it.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import uvloop

from curation.config.fetch import FetchConfig
from curation.crawl.bulk import hash_all
from curation.crawl.client import Answer, Client, Heard, RetryLaterError, backoff_s
from curation.crawl.schedule import Schedule, Turn
from curation.crawl.urls import WebUrl, parse
from curation.errors import ImageError, LinkError

T = TypeVar("T")

_SILENT = frozenset({"dns", "connect", "tls", "timeout"})  # where nothing was heard: may be the whole host
_BUSY_STATUSES = frozenset({429, 503})
_POLL_S = 0.1
_RELEASED_AT_ONCE = 16  # each release wakes the event loop


@dataclass(frozen=True, slots=True)
class Visited(Generic[T]):
    """What became of one URL: the checked value, or an error.

    Attributes:
        index: Position of the URL.
        answer: None where there was none.
        value: What the check made of the answer; None where it or the download failed.
        error: None where all went well.
        elapsed_ms: Spent on it, from the first attempt to the last byte.
        num_redirects: That were followed.
        heard: Of the last request; None where there was none.
    """

    index: int
    answer: Answer | None
    value: T | None
    error: LinkError | ImageError | None
    elapsed_ms: int
    num_redirects: int = 0
    heard: Heard | None = None


@dataclass(slots=True)
class _Visit:
    """How far one URL has come."""

    url: WebUrl
    num_redirects: int = 0
    num_failures: int = 0
    spent_s: float = 0.0
    heard: Heard = field(default_factory=Heard)


class Visitor(Generic[T]):
    """Visit many URLs.

    Args:
        fetch: Limits.
        client: Makes the client; called in the event loop.
        check: Turns an answer into a value, in a thread; raises ImageError or LinkError.
        num_threads: Threads that check.
    """

    def __init__(
        self, fetch: FetchConfig, client: Callable[[], Client], check: Callable[[Answer], T], num_threads: int
    ) -> None:
        self._fetch = fetch
        self._client = client
        self._check = check
        self._num_threads = num_threads

    def visit(
        self,
        urls: Sequence[str],
        shares: Sequence[int] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Visited[T]]:
        """Yield what became of each URL, as they complete.

        Closing the iterator, or ``should_stop``, cancels what is in flight; some URLs are then not yielded.

        Args:
            urls: Normalised.
            shares: Of each, how many shards of the run ask its host; None: only this one.
            should_stop: Asked often.
        """
        if not urls:
            return
        pass_ = _Pass(self._fetch, self._check, self._num_threads, urls, shares or [1] * len(urls))
        runner = _LoopThread(pass_.run(self._client))
        taken: list[Visited[T]] = []
        try:
            for _ in range(len(urls)):
                result = _next(pass_.results, runner.done, should_stop)
                if result is None:
                    return
                taken.append(result)
                if len(taken) >= _RELEASED_AT_ONCE or pass_.results.empty():
                    runner.call(partial(pass_.release, [visited.answer for visited in taken]))
                    taken.clear()
                yield result
        finally:
            runner.stop()


class _Pass(Generic[T]):
    """One pass over a list of URLs."""

    def __init__(
        self,
        fetch: FetchConfig,
        check: Callable[[Answer], T],
        num_threads: int,
        urls: Sequence[str],
        shares: Sequence[int],
    ) -> None:
        self.results: queue.SimpleQueue[Visited[T] | BaseException] = queue.SimpleQueue()
        self._fetch = fetch
        self._check = check
        self._urls = urls
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="check")
        self._num_threads = num_threads
        # Threads take from here, for a task of the pool costs 20 us; None ends one of them.
        self._unchecked: queue.SimpleQueue[Visited[T] | None] = queue.SimpleQueue()
        slots = slots_of(urls) if max(shares) > 1 else [0] * len(urls)
        self._schedule = Schedule((urlsplit(url).netloc for url in urls), shares, slots, fetch)
        # Twice, so that the network stays busy while the caller stores what came before.
        self._places = asyncio.Semaphore(2 * fetch.concurrency)
        self._visits: dict[int, _Visit] = {}  # that wait for another turn

    async def run(self, make_client: Callable[[], Client]) -> None:
        """Put one result a URL into ``results``."""
        for _ in range(self._num_threads):
            self._pool.submit(self._check_all)
        try:
            async with make_client() as self._client:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._fetch.concurrency, len(self._urls))):
                        group.create_task(self._work())
                self._end_threads()
                await asyncio.to_thread(self._pool.shutdown)
        finally:
            with suppress(queue.Empty):  # what nobody will take any more
                while True:
                    self._unchecked.get_nowait()
            self._end_threads()
            self._pool.shutdown(wait=False)

    def release(self, answers: Sequence[Answer | None]) -> None:
        """Free the places of results that the caller has taken."""
        for answer in answers:
            self._places.release()
            if answer is not None:
                self._client.forget(answer)

    async def _work(self) -> None:
        while True:
            await self._places.acquire()
            turn = await self._schedule.take()
            if turn is None:
                self._places.release()
                return
            visited = self._given_up(turn) if turn.refusal is not None else await self._request(turn)
            if visited is None:
                self._places.release()
            elif visited.answer is None:
                self.results.put(visited)
            else:
                self._unchecked.put(visited)

    def _given_up(self, turn: Turn) -> Visited[T]:
        visit = self._visits.pop(turn.link, None)
        self._schedule.finish(turn)
        return Visited(turn.link, None, None, turn.refusal, 0 if visit is None else round(1000 * visit.spent_s))

    async def _request(self, turn: Turn) -> Visited[T] | None:
        """Do what a turn is for; return what became of the URL, or None where it waits for another turn."""
        visit = self._visits.pop(turn.link, None)
        try:
            if visit is None:
                visit = _Visit(parse(self._urls[turn.link]))
            outcome: Answer | WebUrl | LinkError = await self._attempt(turn, visit)
        except LinkError as refusal:
            outcome = refusal
        if visit is None:
            self._schedule.finish(turn)
            return Visited(turn.link, None, None, LinkError("bad_url"), 0)
        self._learn(turn, visit, outcome)
        if isinstance(outcome, WebUrl):
            outcome = self._redirected(visit, outcome) or outcome
        if isinstance(outcome, WebUrl):
            self._visits[turn.link] = visit
            self._schedule.move(turn, urlsplit(str(outcome)).netloc)
            return None
        if isinstance(outcome, RetryLaterError):
            delay_s = max(outcome.wait_s, backoff_s(visit.num_failures))
            visit.num_failures += 1
            if visit.num_failures <= self._fetch.retries and delay_s <= self._fetch.timeout_s:
                self._visits[turn.link] = visit
                self._schedule.again(turn, delay_s)
                return None
        self._schedule.finish(turn)
        elapsed_ms = round(1000 * visit.spent_s)
        answer, error = (outcome, None) if isinstance(outcome, Answer) else (None, outcome)
        return Visited(turn.link, answer, None, error, elapsed_ms, visit.num_redirects, visit.heard)

    async def _attempt(self, turn: Turn, visit: _Visit) -> Answer | WebUrl:
        """Make one request within what is left of the deadline."""
        visit.heard = Heard()
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._fetch.timeout_s - visit.spent_s):
                await self._client.admit(visit.url)
                self._schedule.known(turn.host, self._client.crawl_delay_s(visit.url))
                return await self._client.request(visit.url, visit.heard)
        except TimeoutError:
            message = f"not done in {self._fetch.timeout_s:g} s"
            raise LinkError("timeout", message, visit.heard.status) from None
        finally:
            visit.spent_s += time.monotonic() - started

    def _redirected(self, visit: _Visit, target: WebUrl) -> LinkError | None:
        if visit.num_redirects == self._fetch.max_redirects:
            return LinkError("too_many_redirects", f"more than {self._fetch.max_redirects}", visit.heard.status)
        visit.num_redirects += 1
        visit.url = target
        return None

    def _learn(self, turn: Turn, visit: _Visit, outcome: Answer | WebUrl | LinkError) -> None:
        """Tell the schedule what a request says about its host."""
        if isinstance(outcome, LinkError) and visit.heard.status is None:
            if outcome.reason in _SILENT:
                self._schedule.silent(turn, str(outcome))
        elif isinstance(outcome, RetryLaterError) and visit.heard.status in _BUSY_STATUSES:
            self._schedule.refused(turn, outcome.wait_s, str(outcome))
        else:
            self._schedule.answered(turn.host)

    def _end_threads(self) -> None:
        for _ in range(self._num_threads):
            self._unchecked.put(None)

    def _check_all(self) -> None:
        """Check answers as they come, in a thread."""
        while (visited := self._unchecked.get()) is not None:
            self._put_checked(visited)

    def _put_checked(self, visited: Visited[T]) -> None:
        """Check an answer; whatever happens, the caller hears of it."""
        index, answer, elapsed_ms = visited.index, visited.answer, visited.elapsed_ms
        value: T | None = None
        error: ImageError | LinkError | None = None
        try:
            if answer is not None:
                value = self._check(answer)
        except (ImageError, LinkError) as refusal:
            error = refusal
        except BaseException as broken:  # noqa: BLE001  # raised in the thread of the caller
            self.results.put(broken)
            return
        self.results.put(Visited(index, answer, value, error, elapsed_ms, visited.num_redirects, visited.heard))


def slots_of(urls: Sequence[str]) -> list[int]:
    """Return a number for each URL that, modulo the shards of its host, is its own one's place among them.

    By this number ``cut`` has dealt them out.
    """
    return [int(code) for code in hash_all(pa.array(urls, pa.string()))]


class _LoopThread:
    """A coroutine in an event loop in a thread."""

    def __init__(self, work: Coroutine[None, None, None]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._started = threading.Event()
        self._task: asyncio.Future[None] | None = None
        self.done = self._thread.submit(self._run, work)
        self.done.add_done_callback(lambda _: self._started.set())  # it may end before it starts
        self._started.wait()

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function`` in the event loop, if it still runs."""
        with suppress(RuntimeError):  # the loop was closed: it has done all it had to do
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Cancel the coroutine where it still runs, and wait for its end."""
        if self._task is not None:
            self.call(self._task.cancel)
        self._thread.shutdown(wait=True)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.ensure_future(work)
            self._started.set()
            with suppress(asyncio.CancelledError):  # by stop
                await self._task

        whole = main()
        try:
            uvloop.run(whole)
        finally:
            for coroutine in (whole, work):  # where there was no loop to run them in
                coroutine.close()


def _next(
    results: "queue.SimpleQueue[Visited[T] | BaseException]",
    done: "Future[None]",
    should_stop: Callable[[], bool] | None,
) -> Visited[T] | None:
    """Return the next result; None when told to stop."""
    while should_stop is None or not should_stop():
        try:
            result = results.get(timeout=_POLL_S)
        except queue.Empty:
            if done.done():
                done.result()  # raises what ended it too early
                if results.empty():
                    raise RuntimeError("the event loop ended before all URLs had a result") from None
            continue
        if isinstance(result, BaseException):
            raise result
        return result
    return None
