"""A hostile little web on loopback, and settings that may visit it."""

import asyncio
import gzip
import io
import math
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from aiohttp import web
from multidict import CIMultiDict
from PIL import Image

from curation.config import RunConfig
from curation.config.fetch import FetchConfig


def make_image(seed: int, side_px: int = 48, kind: str = "JPEG", **options) -> bytes:
    """Return an encoded image of smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def make_huge_png(side_px: int = 50_000) -> bytes:
    """Return a PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


class Site:
    """A web server in a thread.

    Attributes:
        url: ``http://127.0.0.1:port``.
        hits: Path → requests seen.
        log: Path and time of each request.
        busy_until: When ``/limited`` stops answering 429.
        most_at_once: Requests to ``/slow`` that ran at the same time.
        agents: User agents seen.
        robots: Body of robots.txt, or a status.
        tdmrep: Body of tdmrep.json, or a status.
    """

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.log: list[tuple[str, float]] = []
        self.busy_until = 0.0
        self.agents: set[str] = set()
        self.robots: str | int = 404
        self.robots_delay_s = 0.0
        self.tdmrep: str | int = 404
        self.tdmrep_delay_s = 0.0
        self.endless_headers: dict[str, str] = {}
        self.pages: dict[str, str] = {}
        self.page_headers: dict[str, str] = {}
        self.most_at_once = 0
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,))
        self._thread.start()
        self.port = started.result(timeout=30)
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, started: "Future[int]") -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        started.set_result(runner.addresses[0][1])
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.hits[path] += 1
        self.log.append((path, time.monotonic()))
        self.agents.add(request.headers.get("User-Agent", ""))
        if path == "/robots.txt":
            return await self._well_known(self.robots, self.robots_delay_s)
        if path == "/.well-known/tdmrep.json":
            return await self._well_known(self.tdmrep, self.tdmrep_delay_s)
        if path in self.pages:
            return web.Response(text=self.pages[path], content_type="text/html", headers=self.page_headers)
        handler = getattr(self, "_" + path.strip("/").split("/")[0].partition(".")[0], None)
        try:
            return await handler(request) if handler else web.Response(status=404)
        except ConnectionError:  # the client had enough
            return web.Response(status=500)

    async def _well_known(self, body: str | int, delay_s: float) -> web.Response:
        """With headers that opt out: they do not keep the file itself from being read."""
        await asyncio.sleep(delay_s)
        if isinstance(body, int):
            return web.Response(status=body)
        return web.Response(text=body, headers={"X-Robots-Tag": "noai", "TDM-Reservation": "1"})

    async def _tagged(self, request: web.Request) -> web.StreamResponse:
        """An image with the headers that the query names."""
        headers = CIMultiDict((name, value) for name, value in request.query.items() if name != "status")
        answer = web.StreamResponse(status=int(request.query.get("status", 200)), headers=headers)
        await answer.prepare(request)
        await answer.write(make_image(8))
        return answer

    async def _image(self, request: web.Request) -> web.Response:
        return web.Response(body=make_image(int(request.path.rpartition("/")[2].partition(".")[0])))

    async def _status(self, request: web.Request) -> web.Response:
        return web.Response(status=int(request.path.rpartition("/")[2]))

    async def _busy(self, request: web.Request) -> web.Response:
        """429 with Retry-After, once; the path says for how many seconds."""
        if self.hits[request.path] == 1:
            return web.Response(status=429, headers={"Retry-After": request.path.rpartition("/")[2]})
        return web.Response(body=make_image(1))

    async def _limited(self, request: web.Request) -> web.Response:
        """429 for all, until ``busy_until``."""
        left_s = self.busy_until - time.monotonic()
        if left_s > 0:
            return web.Response(status=429, headers={"Retry-After": str(math.ceil(min(left_s, 3600)))})
        return web.Response(body=make_image(1))

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(1000):
            await answer.write(b"x")
            await asyncio.sleep(0.05)
        return answer

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers=self.endless_headers)
        await answer.prepare(request)
        while True:
            await answer.write(bytes(1 << 16))

    async def _slow(self, request: web.Request) -> web.Response:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0.03)
        self._at_once -= 1
        return web.Response(body=make_image(2))

    async def _announced(self, request: web.Request) -> web.StreamResponse:
        """Announce more bytes than allowed, send few."""
        answer = web.StreamResponse(headers={"Content-Length": "999999999"})
        await answer.prepare(request)
        await answer.write(b"x")
        await asyncio.sleep(30)
        return answer

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        """Announce more bytes than are sent, and close."""
        image = make_image(3)
        answer = web.StreamResponse(headers={"Content-Length": str(len(image) + 50), "Connection": "close"})
        await answer.prepare(request)
        await answer.write(image)
        assert request.transport is not None
        request.transport.abort()
        return answer

    async def _short(self, request: web.Request) -> web.Response:
        """Half a JPEG, honestly announced."""
        image = make_image(4, 200)
        return web.Response(body=image[: len(image) // 2])

    async def _bomb(self, request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"})

    async def _gzipped(self, request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(make_image(5)), headers={"Content-Encoding": "gzip"})

    async def _garbled(self, request: web.Request) -> web.Response:
        return web.Response(body=make_image(5), headers={"Content-Encoding": "gzip"})

    async def _html(self, request: web.Request) -> web.Response:
        return web.Response(text="<html><p>not here</p></html>", content_type="image/jpeg")

    async def _empty(self, request: web.Request) -> web.Response:
        return web.Response(body=b"", content_type="image/jpeg")

    async def _huge(self, request: web.Request) -> web.Response:
        return web.Response(body=make_huge_png())

    async def _tiny(self, request: web.Request) -> web.Response:
        return web.Response(body=make_image(6, 4, "PNG"))

    async def _round(self, request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/round"})

    async def _nowhere(self, request: web.Request) -> web.Response:
        return web.Response(status=301)

    async def _to(self, request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": request.query["url"]})

    async def _reset(self, request: web.Request) -> web.Response:
        """Close without an answer, the first time."""
        if self.hits[request.path] == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=make_image(7))


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


def settings(**fetch) -> RunConfig:
    """Return a run's settings whose fetcher may visit loopback."""
    values = {"allow_private_addresses": True, "timeout_s": 5.0, "retries": 0, "max_bytes": 200_000, **fetch}
    return RunConfig(fetch=FetchConfig(**values))


@pytest.fixture(name="settings")
def _settings():
    return settings


@pytest.fixture(name="make_image")
def _make_image():
    return make_image
