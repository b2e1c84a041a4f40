"""One request and its answer, whatever the server does.

``Client.admit`` says whether a URL may be requested, ``Client.request`` does so. Whoever follows a redirect asks both
again: each hop is checked like the first URL, its form, its domain, its address, its robots.txt. Environment proxies,
cookies and netrc are not used. Where the settings name a proxy, names are resolved and checked here before it is asked;
it resolves them again, so it has to refuse private addresses itself.
"""

import asyncio
import email.utils
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
import yarl

from curation.config.fetch import FetchConfig
from curation.crawl.addresses import (
    CheckedResolver,
    IPAddress,
    anything,
    check_host,
    checked_socket,
    is_literal,
    is_public,
)
from curation.crawl.body import read_body
from curation.crawl.consent import Consent
from curation.crawl.framing import FramedConnector
from curation.crawl.policy import UrlPolicy
from curation.crawl.robots import MAX_ROBOTS_REDIRECTS
from curation.crawl.urls import WebUrl, parse
from curation.errors import LinkError

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
_FIRST_BACKOFF_S = 0.5
# Bodies above body.LARGE_BYTES that are read at a time: they would fill the memory, and keep small ones waiting.
_LARGE_BODIES_BYTES, _LARGE_BODIES = 512 << 20, 16
# A look-up goes on when its link has met its deadline: names that nobody answers for must not take all the threads.
_LOOKUPS_PER_REQUEST, _MAX_LOOKUPS = 4, 512
# Short, because a crawl meets thousands of hosts a minute: idle connections would use up the file descriptors.
_KEEPALIVE_S = 3.0


@dataclass(slots=True)
class Heard:
    """What was heard of a server while a request was under way, be it answered or not.

    Attributes:
        status: HTTP status; None where there was no answer.
        received_bytes: Of the body, as they came over the wire; None where none was read to its end.
        etag: Header.
        last_modified: Header.
    """

    status: int | None = None
    received_bytes: int | None = None
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server sent in the end.

    Attributes:
        status: HTTP status, 2xx.
        body: Decompressed.
        url: Where it came from.
        content_type: Header as sent; empty where there is none.
        opt_out: Why its headers forbid the use of what it shows, one of ``LINK_REASONS``; None: they do not.
        is_large: Whoever is done with the body calls ``Client.forget``.
    """

    status: int
    body: bytes
    url: WebUrl
    content_type: str
    opt_out: str | None = None
    is_large: bool = False


class Client:
    """HTTP with limits; an async context manager.

    Args:
        config: Limits.
        max_bytes: Limit of a body.
        accept: Accept header.
        cut: Keep the first ``max_bytes`` of a longer body instead of refusing it.
        refuse_opt_out: Do not read the body of an answer whose headers opt out; else it comes with ``Answer.opt_out``.
        policy: Which URLs are visited; None: as ``config.policy`` says.
        allow: Which addresses may be connected to; None: as ``config.allow_private_addresses`` says.
        resolver: None: a new one that obeys ``allow``.
    """

    def __init__(
        self,
        config: FetchConfig,
        max_bytes: int,
        accept: str,
        cut: bool = False,
        refuse_opt_out: bool = True,
        policy: UrlPolicy | None = None,
        allow: Callable[[IPAddress], bool] | None = None,
        resolver: CheckedResolver | None = None,
    ) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._cut = cut
        self._accept = accept
        self._allow = allow or (anything if config.allow_private_addresses else is_public)
        self._given_resolver = resolver
        self._refuse_opt_out = refuse_opt_out
        self._policy = policy or UrlPolicy.load(config.policy)
        self._consent = Consent(config, self._read_well_known)
        self._num_lookups = min(_MAX_LOOKUPS, _LOOKUPS_PER_REQUEST * config.concurrency)
        self._large = asyncio.Semaphore(max(2, min(_LARGE_BODIES, _LARGE_BODIES_BYTES // max_bytes)))

    async def __aenter__(self) -> Self:
        self._resolver = self._given_resolver or CheckedResolver(self._allow, num_threads=self._num_lookups)
        proxy = self._config.proxy
        # The only connections are then those to the proxy, wherever it is.
        self._connected = self._resolver if proxy is None else CheckedResolver(anything)
        connector = FramedConnector(
            resolver=self._connected,
            use_dns_cache=False,  # the resolver has its own, which also keeps refusals
            socket_factory=checked_socket(self._allow if proxy is None else anything),
            limit=0,
            keepalive_timeout=_KEEPALIVE_S,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,  # read_body does, with a limit
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            proxy=proxy,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._config.connect_timeout_s, sock_read=self._config.idle_timeout_s
            ),
            headers={
                "User-Agent": self._config.user_agent,
                "Accept": self._accept,
                "Accept-Encoding": "gzip, deflate",
            },
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consent.close()
        await self._session.close()
        for resolver in {self._resolver, self._connected} - {self._given_resolver}:
            await resolver.close()

    async def admit(self, url: WebUrl) -> None:
        """Refuse a URL before anything is sent to it; reads what its origin says about that first.

        Raises:
            LinkError: With one of ``links.LINK_REASONS``.
        """
        self._policy.check(url)
        await self._check_host(url)
        await self._consent.check(url)

    def crawl_delay_s(self, url: WebUrl) -> float:
        """Return the seconds that the origin of an admitted URL wants between two requests."""
        return self._consent.crawl_delay_s(url)

    async def request(self, url: WebUrl, heard: Heard) -> Answer | WebUrl:
        """Request an admitted URL; return the answer, or where a redirect points to.

        Args:
            url: As ``admit`` has seen it.
            heard: Is filled in, also where this raises.

        Raises:
            RetryLaterError: Another attempt may succeed.
            LinkError: With one of ``links.LINK_REASONS``, or ``http_<status>``.
        """
        return await self._request(url, heard, None)

    def forget(self, answer: Answer) -> None:
        """Make place for other bodies; to be called in the event loop."""
        if answer.is_large:
            self._large.release()

    async def _check_host(self, url: WebUrl) -> None:
        check_host(url.host, self._allow)
        if self._config.proxy is not None and not is_literal(url.host):
            await self._resolver.resolve(url.host, url.port)

    async def _request(self, url: WebUrl, heard: Heard, max_bytes: int | None) -> Answer | WebUrl:
        """See ``request``; ``max_bytes`` is given for the well-known files that say what may be visited."""
        try:
            async with self._session.get(
                yarl.URL(str(url), encoded=True), allow_redirects=False, proxy=self._config.proxy
            ) as answer:
                return await self._take(answer, url, heard, max_bytes)
        except (ssl.SSLError, ssl.CertificateError, aiohttp.ClientSSLError) as error:
            raise LinkError("tls", _said(error)) from error
        except aiohttp.ClientPayloadError as error:
            raise RetryLaterError("truncated", _said(error), heard.status) from error
        except aiohttp.SocketTimeoutError as error:
            raise LinkError("timeout", f"no byte for {self._config.idle_timeout_s:g} s", heard.status) from error
        except aiohttp.ServerTimeoutError as error:
            raise RetryLaterError("connect", _said(error)) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: what aiohttp raises on some malformed answers.
            if isinstance(error, TimeoutError):
                raise
            reason = "connect" if heard.status is None else "truncated"
            raise RetryLaterError(reason, _said(error), heard.status) from error

    async def _take(
        self, answer: aiohttp.ClientResponse, url: WebUrl, heard: Heard, max_bytes: int | None
    ) -> Answer | WebUrl:
        heard.status = answer.status
        heard.etag, heard.last_modified = _header(answer, "ETag"), _header(answer, "Last-Modified")
        if not 200 <= answer.status < 300 and answer.status not in _REDIRECTS:
            raise _status_error(answer)
        opt_out = self._consent.opt_out(answer.headers) if max_bytes is None else None
        if opt_out is not None and self._refuse_opt_out:
            raise LinkError(opt_out, "the answer's headers say so", answer.status)
        if answer.status in _REDIRECTS:
            return _target(answer, url)
        try:
            limit, cut = max_bytes or self._max_bytes, self._cut or max_bytes is not None
            body = await read_body(answer, limit, self._large, cut)
        except LinkError as error:
            error.status = answer.status
            raise
        heard.received_bytes = body.received_bytes
        if not body.data:
            raise LinkError("empty", "no bytes", answer.status)
        content_type = answer.headers.get("Content-Type", "")
        return Answer(answer.status, body.data, url, content_type, opt_out, body.is_large)

    async def _read_well_known(self, url: WebUrl, max_bytes: int) -> bytes:
        for attempt in range(self._config.retries + 1):
            try:
                return await self._follow_well_known(url, max_bytes)
            except RetryLaterError as error:
                delay_s = max(error.wait_s, backoff_s(attempt) / 4)
                if attempt == self._config.retries or delay_s > self._config.timeout_s / 4:
                    raise  # and say what is wrong while there is time
                await asyncio.sleep(delay_s)
        raise LinkError("connect", "no attempt was made")

    async def _follow_well_known(self, url: WebUrl, max_bytes: int) -> bytes:
        for _ in range(MAX_ROBOTS_REDIRECTS + 1):
            self._policy.check_origin(url)
            await self._check_host(url)
            answer = await self._request(url, Heard(), max_bytes)
            if isinstance(answer, Answer):
                self.forget(answer)
                return answer.body
            url = answer
        raise LinkError("too_many_redirects", f"more than {MAX_ROBOTS_REDIRECTS}")


class RetryLaterError(LinkError):
    """A failure that may be gone at the next attempt.

    Attributes:
        wait_s: What the server asked for, in seconds.
    """

    def __init__(self, reason: str, detail: str = "", status: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(reason, detail, status)
        self.wait_s = wait_s


def _header(answer: aiohttp.ClientResponse, name: str) -> str | None:
    value = answer.headers.get(name)
    return None if value is None else _text(value)


def _text(sent: str) -> str:
    """Return what a server wrote as text that can be stored: bytes that are no UTF-8 come as lone surrogates."""
    return sent.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _target(answer: aiohttp.ClientResponse, url: WebUrl) -> WebUrl:
    location = answer.headers.get("Location", "")
    if not location:
        raise LinkError("bad_redirect", "no Location", answer.status)
    try:
        return parse(location, str(url))
    except LinkError as error:
        raise LinkError("bad_redirect", error.detail, answer.status) from error


def _status_error(answer: aiohttp.ClientResponse) -> LinkError:
    reason = f"http_{answer.status}"
    said = _text(answer.reason or "")
    if answer.status not in _RETRIED_STATUSES:
        return LinkError(reason, said, answer.status)
    wait_s = retry_after_s(answer.headers.get("Retry-After", ""))
    return RetryLaterError(reason, said, answer.status, wait_s)


def backoff_s(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt (the first is 0), jittered: links shall not return together."""
    return random.uniform(0.5, 1.0) * _FIRST_BACKOFF_S * 2.0**attempt


def retry_after_s(header: str) -> float:
    """Return the seconds that a Retry-After header asks for; 0 where it says nothing."""
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
