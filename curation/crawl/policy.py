"""Which URLs are visited: ports, domains, patterns, tracking pixels.

The form of a URL (scheme, credentials) is checked where it is parsed, and its address where it is connected to. Links,
live pages and targets of redirects go through the same checks.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from curation.config.fetch import PolicyConfig
from curation.crawl.domain_lists import DomainSet, list_digests, load_domains
from curation.crawl.globs import Glob, caseless
from curation.crawl.hosts import parse_host
from curation.crawl.tracking import is_tracking_pixel
from curation.crawl.urls import DEFAULT_PORTS, WebUrl
from curation.errors import InputError, LinkError

# Ports of services that an HTTP request could be made to talk to. Source: Fetch Standard, "bad port".
BAD_PORTS = frozenset(
    {
        *(0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104),
        *(109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515),
        *(526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049),
        *(3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080),
    }
)
MAX_PATTERNS = 10_000  # each is tried on each URL
_MAX_LINE_CHARS = 1 << 16
_SCHEME = re.compile(r"([A-Za-z*]+)://")
_HOST_END = re.compile(r"[/?]")


class UrlPolicy:
    """The checks of ``fetch.policy``.

    Args:
        blocked: Domains that are refused.
        allowed: None: all others; else only these.
        patterns: Whole URLs that are refused, in the spelling of ``url_globs``.
        ports: Empty: all but ``BAD_PORTS``.
        tracking_pixels: Refuse them.
    """

    def __init__(
        self,
        blocked: DomainSet | None = None,
        allowed: DomainSet | None = None,
        patterns: Sequence[Glob] = (),
        ports: Sequence[int] = (),
        tracking_pixels: bool = True,
    ) -> None:
        self._blocked = blocked
        self._allowed = allowed
        self._patterns = tuple(patterns)
        self._ports = frozenset(ports)
        self._tracking_pixels = tracking_pixels

    @classmethod
    def load(cls, config: PolicyConfig) -> Self:
        """Read the lists that the settings name.

        Raises:
            InputError: A list cannot be read, names no domain, or there are more than ``MAX_PATTERNS`` patterns.
        """
        blocked, allowed = (
            load_domains(paths, config.whole_domains) if paths else None
            for paths in (config.blocked_domains, config.allowed_domains)
        )
        patterns = [*config.blocked_urls, *_lines(config.blocked_url_lists)]
        if len(patterns) > MAX_PATTERNS:
            raise InputError(
                f"fetch.policy: {len(patterns)} patterns of URLs, at most {MAX_PATTERNS} are tried on each URL; "
                "put whole domains into blocked_domains"
            )
        globs = [glob for pattern in patterns for glob in url_globs(pattern)]
        return cls(blocked, allowed, globs, config.ports, config.tracking_pixels)

    def check(self, url: WebUrl) -> None:
        """Refuse a URL of an image or a page that is not to be visited.

        Raises:
            LinkError: ``policy_port``, ``policy_domain``, ``policy_pattern`` or ``tracking_pixel``.
        """
        self.check_origin(url)
        if self._patterns and any(pattern.matches(text) for text in _texts(url) for pattern in self._patterns):
            raise LinkError("policy_pattern", "a pattern of fetch.policy.blocked_urls matches it")
        if self._tracking_pixels and is_tracking_pixel(url):
            raise LinkError("tracking_pixel", "its address is one of a tracking pixel")

    def check_origin(self, url: WebUrl) -> None:
        """Refuse a port or a domain; all that is checked of files that say what may be visited.

        Raises:
            LinkError: ``policy_port`` or ``policy_domain``.
        """
        if url.port not in self._ports if self._ports else url.port in BAD_PORTS:
            raise LinkError("policy_port", f"port {url.port} is not visited")
        if self._blocked is not None and self._blocked.covers(url.host):
            raise LinkError("policy_domain", f"{url.host} is on a list of fetch.policy.blocked_domains")
        if self._allowed is not None and not self._allowed.covers(url.host):
            raise LinkError("policy_domain", f"{url.host} is on no list of fetch.policy.allowed_domains")


def left_out(config: PolicyConfig) -> list[str]:
    """Return what lists of domains hold that is no domain, in words, a list at a time."""
    found = {}
    for paths in (config.blocked_domains, config.allowed_domains):
        for path, contents in zip(paths, load_domains(paths, config.whole_domains).contents, strict=True):
            if contents.num_others:
                found[path] = (
                    f"fetch.policy: {path}: {contents.num_others:,} of {sum(contents[:2]):,} entries name no domain "
                    f"and are left out, the first in line {contents.first_other:,}"
                )
    return list(found.values())


def url_globs(pattern: str) -> list[Glob]:
    """Return the globs of a pattern of URLs: a URL matches the pattern if it matches one of them.

    Case does not matter. Without a scheme or a port a pattern stands for all of them, and a host alone for all URLs of
    that host. What begins with ``*`` may be of anything (``*.gif``).

    Raises:
        InputError: Its host cannot be one.
    """
    found = _SCHEME.match(pattern)
    scheme, rest = (found[1].lower(), pattern[found.end() :]) if found else ("*", pattern)
    host = _HOST_END.split(rest, maxsplit=1)[0]
    path = rest[len(host) :]
    if found is None and pattern.startswith("*"):
        return [Glob(caseless((_ascii(host) if path.startswith("/") else host) + path))]
    if "*" not in host:
        path = f"/{path}" if path.startswith("?") else path or "/*"
    hosts = {
        scheme: _ascii(host.removesuffix(f":{DEFAULT_PORTS.get(scheme)}").removesuffix("."))
        for scheme in (DEFAULT_PORTS if scheme == "*" else (scheme,))
    }
    return [Glob(caseless(f"{scheme}://{host}{path}")) for scheme, host in hosts.items()]


def _ascii(host: str) -> str:
    """Return the host of a pattern as it stands in normalised URLs."""
    if host.isascii():
        return host
    name, colon, port = host.partition(":")
    try:
        return parse_host(name) + colon + port
    except LinkError as error:
        raise InputError(f"fetch.policy: pattern with host {host[:200]}: {error.detail}") from error


def _texts(url: WebUrl) -> list[str]:
    """Return what patterns are matched with: the URL without its port, and with it where it is not the default."""
    host = url.host.removesuffix(".")
    rest = caseless(url.path_and_query)
    texts = [f"{url.scheme}://{host}{rest}"]
    if url.port != DEFAULT_PORTS[url.scheme]:
        texts.append(f"{url.scheme}://{host}:{url.port}{rest}")
    return texts


def policy_settings(config: PolicyConfig) -> dict[str, Any]:
    """Return the settings as plain values, with the digests of lists in place of their paths."""
    values = config.model_dump(mode="json")
    return values | {name: list_digests(getattr(config, name)) for name in PolicyConfig.LISTS}


def _lines(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        try:
            with Path(path).open(encoding="utf-8-sig", errors="replace") as stream:
                while line := stream.readline(_MAX_LINE_CHARS):
                    if (text := line.strip()) and not text.startswith("#"):
                        yield text
        except OSError as error:
            raise InputError(f"fetch.policy: {path} cannot be read: {error.strerror}") from error
