"""Which URLs are visited: ports, domains, patterns, tracking pixels.

The form of a URL (scheme, credentials) is checked where it is parsed, and its address where it is connected to. Links,
live pages and targets of redirects go through the same checks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from curation.config.fetch import PolicyConfig
from curation.crawl.domain_lists import DomainSet, list_digests, load_domains
from curation.crawl.globs import Glob, comparable
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


class UrlPolicy:
    """The checks of ``fetch.policy``.

    Args:
        blocked: Domains that are refused.
        allowed: None: all others; else only these.
        patterns: Whole URLs that are refused, in the spelling of ``url_glob``.
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
        return cls(blocked, allowed, [url_glob(pattern) for pattern in patterns], config.ports, config.tracking_pixels)

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


def url_glob(pattern: str) -> Glob:
    """Return the glob of a pattern of URLs; case does not matter, and without a scheme or a port it stands for all.

    Raises:
        InputError: Its host cannot be one.
    """
    if "://" not in pattern and not pattern.startswith("*"):
        pattern = "*://" + pattern
    scheme, separator, rest = pattern.rpartition("://")
    host, slash, path = rest.partition("/")
    if not host.isascii():
        try:
            host = parse_host(host)
        except LinkError as error:
            raise InputError(f"fetch.policy: pattern {pattern[:200]}: {error.detail}") from error
    return Glob(comparable(f"{scheme}{separator}{host}{slash}{path}").lower())


def _texts(url: WebUrl) -> list[str]:
    """Return what patterns are matched with: the URL without its port, and with it where it is not the default."""
    host = url.host.removesuffix(".")
    rest = comparable(url.path_and_query).lower()
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
