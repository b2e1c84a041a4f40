"""robots.txt: what a site lets this crawler visit, asked once per origin.

RFC 9309: an answer of 4xx allows everything, one of 5xx and a time-out refuse everything, at most 500 KiB are read.
Where the host cannot be reached at all, that error stands for the links too.
"""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from protego import Protego

from curation.crawl.urls import WebUrl
from curation.errors import LinkError

MAX_ROBOTS_BYTES = 500 * 1024
MAX_ROBOTS_REDIRECTS = 5
_MAX_WORK = 2_000_000  # lines x agents in a row; Protego stores each rule once for each agent above it
_AGENT_LINE = re.compile(r"\s*user[- ]?agent\b", re.IGNORECASE)
_UNREACHABLE = frozenset({"dns", "connect", "tls", "policy_address", "bad_url"})


def product_token(user_agent: str) -> str:
    """Return the name that robots.txt groups are matched with: ``curation`` of ``curation/0.1 (+https://…)``."""
    return user_agent.split()[0].split("/")[0] if user_agent.strip() else user_agent


def parse_rules(text: str) -> Protego:
    """Parse a robots.txt.

    Raises:
        LinkError: With reason ``robots`` where the file is built to take forever.
    """
    lines = text.splitlines()
    run = longest = 0
    for line in lines:
        run = run + 1 if _AGENT_LINE.match(line) else 0
        longest = max(longest, run)
    if longest * len(lines) > _MAX_WORK:
        raise LinkError("robots", f"robots.txt names {longest} agents in a row in {len(lines)} lines")
    return Protego.parse(text)


class Robots:
    """Rules of the origins visited so far.

    Args:
        read: Fetches a robots.txt with at most ``MAX_ROBOTS_BYTES`` of body, following redirects; raises LinkError.
        user_agent: As sent with requests.
        deadline_s: Limit of one robots.txt. Below the deadline of a link, so that a link whose robots.txt hangs ends
            as ``robots`` and not, by chance, as ``timeout``.
    """

    TTL_S = 3600.0 * 24  # RFC 9309: not longer than a day
    FAILURE_TTL_S = 60.0
    MAX_ENTRIES = 5_000

    def __init__(self, read: Callable[[WebUrl], Awaitable[bytes]], user_agent: str, deadline_s: float) -> None:
        self._read = read
        self._agent = product_token(user_agent)
        self._deadline_s = deadline_s
        self._rules: OrderedDict[str, tuple[float, Protego | LinkError]] = OrderedDict()
        self._running: dict[str, asyncio.Task[Protego | LinkError]] = {}

    async def check(self, url: WebUrl) -> None:
        """Raise LinkError where the origin's robots.txt forbids ``url`` or its host cannot be reached."""
        rules = await self._for_origin(url)
        if isinstance(rules, LinkError):
            raise LinkError(rules.reason, rules.detail)
        if not rules.can_fetch(str(url), self._agent):
            raise LinkError("robots", f"{url.origin}/robots.txt forbids it")

    async def close(self) -> None:
        """Stop what is still being read."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _for_origin(self, url: WebUrl) -> Protego | LinkError:
        entry = self._rules.get(url.origin)
        if entry is not None and entry[0] > time.monotonic():
            self._rules.move_to_end(url.origin)
            return entry[1]
        task = self._running.get(url.origin)
        if task is None:
            # A task of its own: the link that asked first may meet its deadline while others still wait.
            task = self._running[url.origin] = asyncio.create_task(self._load(url))
        return await asyncio.shield(task)

    async def _load(self, url: WebUrl) -> Protego | LinkError:
        address = WebUrl(url.scheme, url.host, url.port, "/robots.txt", None)
        rules: Protego | LinkError
        try:
            async with asyncio.timeout(self._deadline_s):
                body = await self._read(address)
            rules = parse_rules(body[:MAX_ROBOTS_BYTES].decode("utf-8-sig", "replace"))
        except TimeoutError:
            rules = LinkError("robots", f"{address} was not answered in {self._deadline_s:g} s")
        except LinkError as error:
            rules = self._without_rules(address, error)
        finally:
            self._running.pop(url.origin, None)
        ttl_s = self.FAILURE_TTL_S if isinstance(rules, LinkError) else self.TTL_S
        self._rules[url.origin] = (time.monotonic() + ttl_s, rules)
        while len(self._rules) > self.MAX_ENTRIES:
            self._rules.popitem(last=False)
        return rules

    def _without_rules(self, address: WebUrl, error: LinkError) -> Protego | LinkError:
        found = re.fullmatch(r"http_4\d\d", error.reason)
        if found or error.reason in ("too_many_redirects", "bad_redirect", "empty"):
            return Protego.parse("")
        if error.reason in _UNREACHABLE:
            return LinkError(error.reason, error.detail)
        return LinkError("robots", f"{address} could not be read: {error}")
