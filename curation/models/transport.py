"""One HTTP answer, from where it may come: checked URLs, few redirects, environment proxies, no endless headers.

Only ``https`` is used, and ``http`` to this machine itself. Proxies are those of the environment (``https_proxy``,
``no_proxy``), as with curl; this machine itself is never reached through one. Certificates are those that OpenSSL
trusts (``SSL_CERT_FILE`` adds a company's own). Errors name a URL without its query, which often is a credential.
"""

import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import Any

from curation.errors import WeightsError

_OFFLINE_VARIABLES = ("CURATION_OFFLINE", "HF_HUB_OFFLINE")
_TRUE = frozenset({"1", "true", "yes", "on"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\xff]")


@dataclass(frozen=True)
class Limits:
    """How long and how much.

    Attributes:
        idle_s: Seconds without a byte, also while connecting.
        answer_s: Seconds until the answer's headers are complete.
        stall_s: Seconds in which at least ``stall_bytes`` have to arrive: a server that drips is given up.
        stall_bytes: See ``stall_s``.
        max_bytes: Size of a file whose size is not pinned.
        max_redirects: Redirects that are followed.
        attempts: Attempts in a row that bring next to nothing.
        backoff_s: Seconds before the second of them; doubles.
    """

    idle_s: float = 30.0
    answer_s: float = 60.0
    stall_s: float = 60.0
    stall_bytes: int = 64 << 10
    max_bytes: int = 32 << 30
    max_redirects: int = 5
    attempts: int = 3
    backoff_s: float = 0.5


class RangeRefused(Exception):  # noqa: N818  # an answer, not a failure
    """The server has no such range (416).

    Attributes:
        content_range: What it says about it, such as ``bytes */1000``.
    """

    def __init__(self, content_range: str) -> None:
        super().__init__(content_range)
        self.content_range = content_range


def offline_variable() -> str | None:
    """Return the assignment that forbids the network, such as ``CURATION_OFFLINE=1``; None where nothing does."""
    for name in _OFFLINE_VARIABLES:
        value = os.environ.get(name, "")
        if value.strip().lower() in _TRUE:
            return f"{name}={value}"
    return None


def redacted(url: str) -> str:
    """Return a URL without what may be secret: credentials, query and fragment."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "an unreadable URL"
    host = parts.netloc.rpartition("@")[2]
    query = "?…" if parts.query else ""
    return _UNPRINTABLE.sub("?", f"{parts.scheme}://{host}{parts.path}") + query


def redacted_text(text: str) -> str:
    """Return the first line of another library's message, without the queries of its URLs and unprintable bytes."""
    line = re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "?…", (text.strip().splitlines() or [""])[0])
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line)


def check_url(url: str, redirected_from: str | None = None) -> None:
    """Refuse a URL that is not to be downloaded from.

    Raises:
        WeightsError: Another scheme than https (http for this machine itself), credentials in it, a redirect from
            elsewhere to this machine, or no URL at all.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urllib.parse.SplitResult("", "", "", "", "")
    if _UNPRINTABLE.search(url) or not host or port == 0:
        raise WeightsError(f"{redacted(url)} is no URL")
    if parts.username is not None or parts.password is not None:
        raise WeightsError(f"{redacted(url)} carries credentials; download the file yourself and name its path")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(url)):
        raise WeightsError(f"{redacted(url)}: only https URLs are downloaded (and http ones of this machine)")
    if redirected_from is not None and is_loopback(url) and not is_loopback(redirected_from):
        raise WeightsError(f"{redacted(redirected_from)} redirects to {redacted(url)}, on this machine")


def is_loopback(url: str) -> bool:
    """Return whether a URL's host is this machine itself."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_url(url: str, headers: dict[str, str], limits: Limits) -> http.client.HTTPResponse:
    """Return the answer to a GET, its body still unread: status 200 or 206.

    Raises:
        RangeRefused: Status 416.
        WeightsError: The URL or its answer is refused for good.
        OSError: Something that may pass.
    """
    origin = url
    for _ in range(limits.max_redirects + 1):
        answer = _answer(url, headers, limits)
        if isinstance(answer, http.client.HTTPResponse):
            return answer
        try:
            target = urllib.parse.urljoin(url, answer)
        except ValueError as error:
            raise WeightsError(f"{redacted(url)} redirects to what is no URL") from error
        check_url(target, redirected_from=url)
        url = target
    raise WeightsError(f"{redacted(origin)} redirects more than {limits.max_redirects} times")


def _answer(url: str, headers: dict[str, str], limits: Limits) -> http.client.HTTPResponse | str:
    """Return the answer, or where it redirects to."""
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (checked by check_url)
    try:
        answer: http.client.HTTPResponse = _opener(url, limits).open(request, timeout=limits.idle_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                raise RangeRefused(error.headers.get("Content-Range", "")) from error
            return _location(url, error)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise WeightsError(
                f"{redacted(url)}: its certificate is not trusted ({error.reason.verify_message}); "
                "SSL_CERT_FILE names further ones"
            ) from error
        raise ConnectionError(_words(error.reason)) from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"no valid HTTP answer ({type(error).__name__})") from error
    if answer.status not in (200, 206) or answer.headers.get("Content-Encoding", "identity") != "identity":
        with answer:
            raise WeightsError(f"{redacted(url)} gave HTTP {answer.status} that is not the plain file")
    return answer


def _location(url: str, error: urllib.error.HTTPError) -> str:
    location = error.headers.get("Location")
    if error.code in _REDIRECTS and location:
        return location
    if error.code in _PASSING:
        raise ConnectionError(f"HTTP {error.code}") from error
    raise WeightsError(f"{redacted(url)} gave HTTP {error.code}") from error


def _words(reason: object) -> str:
    """Return what happened; never more than the operating system's or OpenSSL's words."""
    if isinstance(reason, TimeoutError):
        return "timed out"
    return _UNPRINTABLE.sub(" ", str(getattr(reason, "strerror", None) or reason))


class _Deadline:
    """Mixed into a connection: headers that drip in are cut off.

    A socket's timeout starts again with each byte, and a hundred headers of 64 KiB make that weeks.
    """

    sock: socket.socket

    def __init__(self, *arguments: Any, answer_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._answer_s = answer_s

    def getresponse(self) -> http.client.HTTPResponse:
        # The plain socket's method: that of an SSL socket would take the TLS state away under a reader.
        timer = threading.Timer(self._answer_s, _hang_up, (self.sock,))
        timer.daemon = True
        timer.start()
        try:
            answer: http.client.HTTPResponse = super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()
        return answer


def _hang_up(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # already closed


class _Http(_Deadline, http.client.HTTPConnection):
    pass


class _Https(_Deadline, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, answer_s: float) -> None:
        super().__init__()
        self._answer_s = answer_s

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Http, answer_s=self._answer_s), request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, answer_s: float) -> None:
        super().__init__()
        self._answer_s = answer_s

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        tls = ssl.create_default_context()
        return self.do_open(partial(_Https, answer_s=self._answer_s, context=tls), request)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would read the whole body of a redirect before it follows."""

    def _leave(self, *_: Any) -> None:
        return None

    http_error_301 = http_error_302 = http_error_303 = http_error_307 = http_error_308 = _leave  # type: ignore[assignment]


def _opener(url: str, limits: Limits) -> urllib.request.OpenerDirector:
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    return urllib.request.build_opener(
        proxies, _NoRedirects(), _HttpHandler(limits.answer_s), _HttpsHandler(limits.answer_s)
    )
