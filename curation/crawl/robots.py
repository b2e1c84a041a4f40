"""robots.txt: what a site lets this crawler visit.

RFC 9309: groups that name the crawler count together, else those of ``*``; the longest rule that matches decides, and
Allow wins a tie; an answer of 4xx allows everything, one of 5xx and a time-out refuse everything; at most 500 KiB are
read. Where the host cannot be reached at all, that error stands for the links too.

Which group is ours is found here, for three reasons: Protego takes a group of ``cur`` for one of ``curation``, lets
lines that the RFC does not know end a group, and stores each rule once for each agent above it, which a file of many
agents and many rules turns into gigabytes. What rules match is left to Protego, which is handed one group.
"""

import math
import re
from dataclasses import dataclass

from protego import Protego

from curation.crawl.globs import MAX_WORK
from curation.crawl.urls import WebUrl
from curation.errors import LinkError

ROBOTS_PATH = "/robots.txt"
MAX_ROBOTS_BYTES = 500 * 1024
MAX_ROBOTS_REDIRECTS = 5
MAX_WILDCARD_RULES = 5_000
_UNREACHABLE = frozenset({"dns", "connect", "tls", "policy_address", "bad_url"})
_ALLOWING = frozenset({"too_many_redirects", "bad_redirect", "empty"})  # as good as no file
_COMPATIBLE = re.compile(r"\(compatible;\s*([^;)\s]+)", re.IGNORECASE)
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_FIELDS = {
    **dict.fromkeys(("user-agent", "useragent", "user agent"), "user-agent"),
    "allow": "allow",
    **dict.fromkeys(("disallow", "dissallow", "dissalow", "disalow", "diasllow", "disallaw"), "disallow"),
    **dict.fromkeys(("crawl-delay", "crawldelay", "crawl delay"), "crawl-delay"),
}


def product_token(user_agent: str) -> str:
    """Return the name that robots.txt groups are matched with.

    It is ``curation`` of ``curation/0.1 (+https://…)`` and of ``Mozilla/5.0 (compatible; curation/0.1; +https://…)``.
    """
    compatible = _COMPATIBLE.search(user_agent)
    name = compatible[1] if compatible else user_agent
    return name.split()[0].split("/")[0] if name.strip() else name


@dataclass(frozen=True, slots=True)
class RobotsRules:
    """The group of a robots.txt that is meant for this crawler.

    Attributes:
        num_rules: Allow and Disallow lines that count.
        num_wildcards: Those with ``*`` or ``$``: each of them is tried on each URL of the origin.
        crawl_delay_s: Seconds that the site wants between two requests; 0 where it asks for none.
    """

    num_rules: int
    num_wildcards: int
    crawl_delay_s: float
    _rules: Protego

    def allows(self, url: WebUrl) -> bool:
        """Return whether ``url``, of this origin, may be visited; not where it takes too long to tell."""
        if not self.num_rules:
            return True
        text = str(url)
        return self.num_wildcards * len(text) <= MAX_WORK and bool(self._rules.can_fetch(text, "*"))


def parse_rules(text: str, agent_token: str) -> RobotsRules:
    """Parse a robots.txt.

    Args:
        text: Up to ``MAX_ROBOTS_BYTES`` of it.
        agent_token: See ``product_token``; case does not matter.

    Raises:
        LinkError: With reason ``robots`` where the file is built to take forever.
    """
    lines = _own_lines(text, agent_token.lower())
    rules = list(dict.fromkeys((field, value) for field, value in lines if field != "crawl-delay" and value))
    num_wildcards = sum("*" in value or value.endswith("$") for _, value in rules)
    if num_wildcards > MAX_WILDCARD_RULES:
        raise LinkError("robots", f"robots.txt has more than {MAX_WILDCARD_RULES} rules with wildcards")
    delays = [_seconds(value) for field, value in lines if field == "crawl-delay"]
    text = "\n".join(["User-agent: *", *(f"{field}: {value}" for field, value in rules)])
    return RobotsRules(len(rules), num_wildcards, max(delays, default=0.0), Protego.parse(text))


def without_rules(error: LinkError, where: str) -> RobotsRules | LinkError:
    """Return what holds for an origin whose robots.txt cannot be read: no rules, or why nothing may be visited."""
    if re.fullmatch(r"http_4\d\d", error.reason) or error.reason in _ALLOWING:
        return parse_rules("", "*")
    if error.reason in _UNREACHABLE:
        return LinkError(error.reason, error.detail)
    return LinkError("robots", f"{where} could not be read: {error}")


def _own_lines(text: str, token: str) -> list[tuple[str, str]]:
    """Return the rules of all groups that name ``token``; of those of ``*`` where none does."""
    of_token: list[tuple[str, str]] = []
    of_all: list[tuple[str, str]] = []
    named = False  # whether any group names the token, be it without rules
    agents: set[str] = set()  # of the group at hand
    in_head = False  # the last line with a meaning named an agent
    for line in _LINE_ENDS.split(text.lstrip("\ufeff\ufffd")):  # a byte order mark, or what is left of one
        field, value = _record(line)
        if field == "user-agent":
            agents = {*agents, _agent(value)} if in_head else {_agent(value)}
            in_head = True
            named |= token in agents
        elif field:
            in_head &= field == "crawl-delay"  # no line that the RFC does not know may end a group
            if token in agents:
                of_token.append((field, value))
            if "*" in agents:
                of_all.append((field, value))
    return of_token if named else of_all


def _record(line: str) -> tuple[str, str]:
    """Return the field, "" where it has no meaning, and its value."""
    text = line.partition("#")[0].strip()
    name, colon, value = text.partition(":")
    if not colon:
        name, _, value = text.partition(" ")
    return _FIELDS.get(name.strip().lower(), ""), value.strip()


def _agent(value: str) -> str:
    """Return the product token of a User-agent line: ``curation`` of ``Curation/2.0`` and of ``curation*``."""
    found = re.match(r"[^\s/]+", value.lower())
    return (found[0].rstrip("*") or "*") if found else ""


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0
