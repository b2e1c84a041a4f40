"""What sites say about being visited and about the use of their images, asked before and while an image is fetched.

Before the first request to an origin its robots.txt is read, then its tdmrep.json; both are kept, so an origin is asked
once. An answer's headers are read before its body. What pages say comes with the links (``Link.opt_out``). Each of
these can be turned off in ``fetch.consent``, and the manifest says so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from curation.config.fetch import ConsentConfig, FetchConfig
from curation.crawl.directives import OPT_OUT_TDM, opt_out_of
from curation.crawl.origin_files import OriginFiles
from curation.crawl.robots import (
    MAX_ROBOTS_BYTES,
    ROBOTS_PATH,
    RobotsRules,
    parse_rules,
    product_token,
    without_rules,
)
from curation.crawl.tdmrep import MAX_TDMREP_BYTES, NOT_RESERVED, TDMREP_PATH, TdmRules, parse_tdmrep
from curation.crawl.urls import WebUrl
from curation.errors import LinkError

TTL_S = 3600.0 * 24  # RFC 9309: not longer than a day
FAILURE_TTL_S = 60.0
_MAX_RULES_KEPT = 200_000  # of all origins: about 100 MB
_ROBOTS_SHARE = (
    1 / 2
)  # of a link's deadline; below 1, so that a robots.txt that hangs is `robots`, not by chance `timeout`
_TDMREP_SHARE = 1 / 4

Read = Callable[[WebUrl, int], Awaitable[bytes]]


class Headers(Protocol):
    """Headers of an answer; names in any case."""

    def getall(self, key: str, default: Sequence[str]) -> Sequence[str]:
        """Return all values of a header."""


class Consent:
    """The checks of ``fetch.consent``.

    Args:
        config: Checks, user agent and deadline.
        read: Fetches a file with at most so many bytes of body, following redirects; raises LinkError.
    """

    def __init__(self, config: FetchConfig, read: Read) -> None:
        self._config = config
        self._read = read
        self._agent = product_token(config.user_agent)
        self._robots: OriginFiles[RobotsRules | LinkError] = OriginFiles(
            self._load_robots, lambda rules: 1 if isinstance(rules, LinkError) else 1 + rules.num_rules, _MAX_RULES_KEPT
        )
        self._tdmrep: OriginFiles[TdmRules] = OriginFiles(
            self._load_tdmrep, lambda rules: 1 + len(rules.rules), _MAX_RULES_KEPT
        )

    async def check(self, url: WebUrl) -> None:
        """Refuse a URL that its origin's robots.txt or tdmrep.json forbids, before it is requested.

        Raises:
            LinkError: ``robots``, ``opt_out_tdm``, or why the host cannot be reached.
        """
        if self._config.consent.robots:
            rules = await self._robots.get(url)
            if isinstance(rules, LinkError):
                raise LinkError(rules.reason, rules.detail)
            if not rules.allows(url):
                raise LinkError("robots", f"{url.origin}{ROBOTS_PATH} forbids it")
        if self._config.consent.tdm and (await self._tdmrep.get(url)).reserves(url):
            raise LinkError(OPT_OUT_TDM, f"{url.origin}{TDMREP_PATH} reserves it")

    def opt_out(self, headers: Headers) -> str | None:
        """Return why the headers of an answer forbid the use of what it holds, or None."""
        consent = self._config.consent
        tags = headers.getall("X-Robots-Tag", ()) if consent.headers else ()
        reservations = headers.getall("TDM-Reservation", ()) if consent.tdm else ()
        reserved = any(value.strip() == "1" for line in reservations for value in line.split(","))
        return opt_out_of(tags, "1" if reserved else None, self._agent)

    def crawl_delay_s(self, url: WebUrl) -> float:
        """Return the seconds that the origin wants between two requests; 0 where none, or before ``check``."""
        rules = self._robots.known(url)
        return rules.crawl_delay_s if isinstance(rules, RobotsRules) else 0.0

    async def close(self) -> None:
        """Stop what is still being read."""
        await self._robots.close()
        await self._tdmrep.close()

    async def _load_robots(self, url: WebUrl) -> tuple[RobotsRules | LinkError, float]:
        address = WebUrl(url.scheme, url.host, url.port, ROBOTS_PATH, None)
        deadline_s = self._config.timeout_s * _ROBOTS_SHARE
        rules: RobotsRules | LinkError
        try:
            async with asyncio.timeout(deadline_s):
                body = await self._read(address, MAX_ROBOTS_BYTES)
            rules = parse_rules(body[:MAX_ROBOTS_BYTES].decode("utf-8-sig", "replace"), self._agent)
        except TimeoutError:
            rules = LinkError("robots", f"{address} was not answered in {deadline_s:g} s")
        except LinkError as error:
            rules = without_rules(error, str(address))
        return rules, FAILURE_TTL_S if isinstance(rules, LinkError) else TTL_S

    async def _load_tdmrep(self, url: WebUrl) -> tuple[TdmRules, float]:
        address = WebUrl(url.scheme, url.host, url.port, TDMREP_PATH, None)
        try:
            async with asyncio.timeout(self._config.timeout_s * _TDMREP_SHARE):
                return parse_tdmrep(await self._read(address, MAX_TDMREP_BYTES)), TTL_S
        except TimeoutError:
            return NOT_RESERVED, FAILURE_TTL_S
        except LinkError as error:  # TDMRep: where the file cannot be had, the origin does not use the protocol
            return NOT_RESERVED, TTL_S if error.reason.startswith("http_4") else FAILURE_TTL_S


def refuse_opt_out(opt_out: str | None, config: ConsentConfig) -> None:
    """Refuse an image for what pages that show it say, where that is to be obeyed.

    Raises:
        LinkError: With ``opt_out`` as its reason.
    """
    if opt_out is not None and config.page and (config.tdm or opt_out != OPT_OUT_TDM):
        raise LinkError(opt_out, "a page that shows it says so")
