"""Tracking pixels: images that count visitors and show nothing, told by their URL alone.

To request one would be counted as a visit. The lists are short on purpose: what they miss is refused as too small once
it was fetched, and ``1x1`` in the middle of a path is more often a picture's shape than its size. Lists of trackers go
into ``fetch.policy.blocked_domains``.
"""

import re
from urllib.parse import parse_qsl

from curation.crawl.urls import WebUrl

# Hosts, with their subdomains, that count visitors and serve nothing to look at.
_HOSTS = frozenset(
    {
        *(
            "2o7.net",
            "alexametrics.com",
            "analytics.twitter.com",
            "atdmt.com",
            "bat.bing.com",
            "b.scorecardresearch.com",
        ),
        *("bluekai.com", "c.statcounter.com", "cm.everesttech.net", "cm.g.doubleclick.net", "counter.yadro.ru"),
        *("crwdcntrl.net", "ct.pinterest.com", "dc.ads.linkedin.com", "demdex.net", "exelator.com"),
        *("google-analytics.com", "googleads.g.doubleclick.net", "googleadservices.com", "hit.gemius.pl"),
        *("ib.adnxs.com", "imrworldwide.com", "in.getclicky.com", "insight.adsrvr.org", "krxd.net", "match.adsrvr.org"),
        *("mc.yandex.ru", "met.vgwort.de", "omtrdc.net", "pixel.facebook.com", "pixel.mathtag.com"),
        *("pixel.quantserve.com", "pixel.rubiconproject.com", "pixel.wp.com", "px.ads.linkedin.com", "rlcdn.com"),
        *("sb.scorecardresearch.com", "secure.quantserve.com", "sstatic1.histats.com", "stats.g.doubleclick.net"),
        *(
            "stats.wordpress.com",
            "stats.wp.com",
            "tns-counter.ru",
            "top-fwz1.mail.ru",
            "tr.snapchat.com",
            "trc.taboola.com",
        ),
        *("whos.amung.us", "xiti.com"),
    }
)
# Paths, and what is below them, of domains that serve other things too.
_PATHS = {
    "amazon-adsystem.com": ("/e/ir",),
    "doubleclick.net": ("/activity", "/ddm/trackimp"),
    "facebook.com": ("/tr",),
    "google.com": ("/ads/ga-audiences", "/pagead"),
    "hubspot.com": ("/__ptq.gif",),
    "linkedin.com": ("/collect",),
    "reddit.com": ("/rp.gif",),
    "t.co": ("/i/adsct",),
    "twitter.com": ("/i/adsct",),
    "typekit.net": ("/p.gif",),
    "yahoo.com": ("/p.gif",),
}
_FILE = re.compile(
    r"(?:__utm|beacon|dot|dot_?clear|track|tracker|tracking|trans|web-?beacon)\.gif|"
    r"(?:1x1|1px|blank|clear|empty|pixel|shim|spacer|tracking-?pixel|transparent|transparent-?pixel)\.(?:gif|png)",
    re.IGNORECASE,
)
_WIDTHS, _HEIGHTS = frozenset({"w", "width", "wid"}), frozenset({"h", "height", "hei"})
_SIZES = frozenset({"size", "s", "dim", "resize", "sz"})
_MAX_PARAMETERS = 100


def is_tracking_pixel(url: WebUrl) -> bool:
    """Return whether a URL is one of a known counter, or says that its image has 1x1 pixel."""
    domain = url.host.removesuffix(".")
    while domain:
        if domain in _HOSTS or any(f"{url.path}/".startswith(f"{path}/") for path in _PATHS.get(domain, ())):
            return True
        domain = domain.partition(".")[2]
    return _FILE.fullmatch(url.path.rpartition("/")[2]) is not None or _says_one_pixel(url.query)


def _says_one_pixel(query: str | None) -> bool:
    if query is None or "1" not in query:
        return False
    try:
        parameters = parse_qsl(query, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        return False
    values = {key.lower(): value for key, value in parameters}
    is_one = {key for key, value in values.items() if value == "1"}
    return bool(is_one & _WIDTHS and is_one & _HEIGHTS) or any(values.get(key) in ("1x1", "1,1") for key in _SIZES)
