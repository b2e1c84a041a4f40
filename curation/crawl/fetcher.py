"""Links of the web to checked images, many at a time.

An event loop in a thread of its own downloads; a few threads decode what arrives; the caller iterates. Memory is
bounded: a link is only started when a place is free, and its place is freed when the caller has taken its result.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from curation.config import FetchConfig, ImagesConfig
from curation.crawl.addresses import CheckedResolver, IPAddress
from curation.crawl.blocked import blocked_images
from curation.crawl.client import Answer, Client
from curation.crawl.links import Fetched, Link
from curation.crawl.schedule import HostTurns
from curation.crawl.verify import refused, verify
from curation.errors import BlocklistedError, ImageError, LinkError
from curation.images import ImageInfo

T = TypeVar("T")

_ACCEPT_IMAGES = "image/avif,image/webp,image/png,image/jpeg,image/*;q=0.8,*/*;q=0.5"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Visited(Generic[T]):
    """What became of one URL: the checked value, or an error.

    Attributes:
        index: Position of the URL.
        answer: None where there was none.
        value: What the check made of the answer; None where it or the download failed.
        error: None where all went well.
        elapsed_ms: From the first attempt to the last byte.
    """

    index: int
    answer: Answer | None
    value: T | None
    error: LinkError | ImageError | None
    elapsed_ms: int


class Visitor(Generic[T]):
    """Visit many URLs politely.

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

    async def run(self, urls: Sequence[str], places: asyncio.Semaphore, sink: Callable[[Visited[T]], None]) -> None:
        """Call ``sink`` once for each URL, as they complete, in the event loop.

        Args:
            urls: Normalised.
            places: One is taken for each URL that is started; whoever consumes the result releases it.
            sink: Must not block.
        """
        turns = HostTurns((urlsplit(url).netloc for url in urls), self._fetch.host_concurrency)
        async with self._client() as client, _thread_pool(self._num_threads) as pool, asyncio.TaskGroup() as group:
            for _ in range(min(self._fetch.concurrency, len(urls))):
                group.create_task(self._work(client, pool, urls, turns, places, sink))

    async def _work(
        self,
        client: Client,
        pool: ThreadPoolExecutor,
        urls: Sequence[str],
        turns: HostTurns,
        places: asyncio.Semaphore,
        sink: Callable[[Visited[T]], None],
    ) -> None:
        while True:
            await places.acquire()
            turn = await turns.take()
            if turn is None:
                places.release()
                return
            index, host = turn
            started = time.monotonic()
            answer, error = None, None
            try:
                answer = await client.get(urls[index])
            except LinkError as refused:
                error = refused
            finally:
                await turns.give_back(host)
            elapsed_ms = round(1000 * (time.monotonic() - started))
            if answer is None:
                sink(Visited(index, None, None, error, elapsed_ms))
                continue
            sink(await self._checked(pool, index, answer, elapsed_ms))

    async def _checked(self, pool: ThreadPoolExecutor, index: int, answer: Answer, elapsed_ms: int) -> Visited[T]:
        try:
            value = await asyncio.get_running_loop().run_in_executor(pool, self._check, answer)
        except (ImageError, LinkError) as error:
            return Visited(index, answer, None, error, elapsed_ms)
        return Visited(index, answer, value, None, elapsed_ms)

    def visit(self, urls: Sequence[str], should_stop: Callable[[], bool] | None = None) -> Iterator[Visited[T]]:
        """Yield what became of each URL, as they complete.

        Closing the iterator, or ``should_stop``, cancels what is in flight; some URLs are then not yielded.
        """
        if not urls:
            return
        results: queue.SimpleQueue[Visited[T]] = queue.SimpleQueue()
        # Twice, so that the network stays busy while the caller stores what came before.
        places = asyncio.Semaphore(2 * self._fetch.concurrency)
        runner = _LoopThread(self.run(urls, places, results.put))
        try:
            for _ in range(len(urls)):
                result = _next(results, runner.done, should_stop)
                if result is None:
                    return
                runner.call(places.release)
                yield result
        finally:
            runner.stop()


class Fetcher:
    """Download and verify images.

    Args:
        fetch: Limits of downloads.
        images: Limits of decoding.
        allow: Which addresses may be connected to; None: as ``fetch.allow_private_addresses`` says.
        resolver: None: one that obeys ``allow``.
    """

    def __init__(
        self,
        fetch: FetchConfig,
        images: ImagesConfig,
        allow: Callable[[IPAddress], bool] | None = None,
        resolver: CheckedResolver | None = None,
    ) -> None:
        blocked = blocked_images(fetch, images)
        self._visitor: Visitor[ImageInfo] = Visitor(
            fetch,
            client=lambda: Client(fetch, fetch.max_bytes, _ACCEPT_IMAGES, allow=allow, resolver=resolver),
            check=lambda answer: verify(answer.body, images, blocked),
            num_threads=images.decode_threads,
        )

    def fetch_all(self, links: Sequence[Link], should_stop: Callable[[], bool] | None = None) -> Iterator[Fetched]:
        """Yield exactly one result for each link of the web, as they complete."""
        for visited in self._visitor.visit([link.url for link in links], should_stop):
            yield _fetched(visited)


def _fetched(visited: Visited[ImageInfo]) -> Fetched:
    answer, error = visited.answer, visited.error
    if isinstance(error, BlocklistedError):
        return refused(visited.index, error)
    if answer is None or error is not None:
        status = answer.status if answer is not None else getattr(error, "status", None)
        reason = "connect" if error is None else error.reason
        detail = "" if error is None else error.detail
        return Fetched(visited.index, None, None, reason, status, visited.elapsed_ms, detail)
    return Fetched(visited.index, answer.body, visited.value, None, answer.status, visited.elapsed_ms)


class _LoopThread:
    """A coroutine in an event loop in a thread."""

    def __init__(self, work: Coroutine[None, None, None]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._started = threading.Event()
        self.done = self._thread.submit(self._run, work)
        self._started.wait()

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function`` in the event loop, if it still runs."""
        with suppress(RuntimeError):  # the loop was closed: it has done all it had to do
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Cancel the coroutine where it still runs, and wait for its end."""
        self.call(self._task.cancel)
        self._thread.shutdown(wait=True)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.ensure_future(work)
            self._started.set()
            with suppress(asyncio.CancelledError):  # by stop
                await self._task

        asyncio.run(main())


def _next(results: "queue.SimpleQueue[T]", done: "Future[None]", should_stop: Callable[[], bool] | None) -> T | None:
    """Return the next result; None when told to stop."""
    while should_stop is None or not should_stop():
        try:
            return results.get(timeout=_POLL_S)
        except queue.Empty:
            if done.done():
                done.result()  # raises what ended it too early
                if results.empty():
                    raise RuntimeError("the event loop ended before all URLs had a result") from None
    return None


@asynccontextmanager
async def _thread_pool(num_threads: int) -> AsyncIterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="verify")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
