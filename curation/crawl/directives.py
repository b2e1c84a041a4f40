"""What robots directives and TDM reservations say about use for machine learning.

Pages and answers say it in the same words: ``<meta name=robots>`` and the ``X-Robots-Tag`` header hold directives, and
``tdm-reservation`` (a ``<meta>`` or a header) reserves the rights of text and data mining.
"""

import re
from collections.abc import Iterable, Iterator

# Directive → reason. The first two were proposed by DeviantArt in 2022, the third by Mojeek in 2023.
OPT_OUT_REASONS = {"noai": "opt_out_noai", "noimageai": "opt_out_noimageai", "noml": "opt_out_noml"}
OPT_OUT_TDM = "opt_out_tdm"

_MAX_VALUE_CHARS = 10_000
_AGENT = re.compile(r"\s*([A-Za-z*][\w*.\-]*)\s*:")
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_WORD = re.compile(r"[\w\-]+")


def opt_out_of(robots_values: Iterable[str], tdm_reservation: str | None, agent_token: str) -> str | None:
    """Return why the images of a page or an answer must not be used, or None.

    Args:
        robots_values: ``content`` of each robots ``<meta>``, or value of each ``X-Robots-Tag`` header. Directives
            behind ``agent:`` count only where the agent is ours or ``*``; it holds up to the next one in the value.
        tdm_reservation: ``1`` reserves all rights; anything else does not.
        agent_token: Of our user agent, see ``robots.product_token``; case does not matter.

    Returns:
        One of ``OPT_OUT_REASONS``, or ``OPT_OUT_TDM``; the smallest of those that apply, so that order does not matter.

    Source:
        Google Search Central, "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications"; W3C TDMRep 1.0.
    """
    found = {OPT_OUT_REASONS[word] for value in robots_values for word in _words(value, agent_token.lower())}
    if tdm_reservation is not None and tdm_reservation.strip() == "1":
        found.add(OPT_OUT_TDM)
    return min(found, default=None)


def _words(value: str, token: str) -> Iterator[str]:
    applies = True
    for part in value[:_MAX_VALUE_CHARS].split(","):
        agent = _AGENT.match(part)
        if agent is not None and (name := agent[1].lower()) not in _WITH_VALUE:
            applies = name in (token, "*")
            part = part[agent.end() :]
        if applies:
            yield from (word for word in _WORD.findall(part.lower()) if word in OPT_OUT_REASONS)
