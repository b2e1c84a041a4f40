"""The images that a page shows: one address for each ``<img>`` or ``<picture>``, the largest on offer.

Of an image with ``srcset`` (or a ``<picture>`` with sources) the widest candidate is taken, of one that loads lazily
what it would load, and ``src`` otherwise. ``data:`` and SVG are skipped and counted.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser, LexborNode

from curation.crawl.directives import opt_out_of
from curation.crawl.tag_cost import refuse_costly
from curation.crawl.urls import normalise
from curation.errors import LinkError

LAZY_SRCSET = ("data-srcset", "data-lazy-srcset", "data-original-set", "nitro-lazy-srcset")
LAZY_SRC = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-original-src",
    "data-hi-res-src",
    "data-full-src",
    "data-image-src",
    "data-img-src",
    "data-image",
    "data-echo",
    "data-lazyload",
    "data-flickity-lazyload",
    "data-pagespeed-lazy-src",
    "data-ll-src",
    "data-cfsrc",
    "data-actualsrc",
    "data-defer-src",
    "nitro-lazy-src",
)

_CANDIDATE = re.compile(r"[\s,]*([^\s]+)")
_DESCRIPTOR_END = re.compile(r"(?:[^,(]|\([^)]*\)?)*")
_SIZE = re.compile(r"\s(\d{1,9}(?:\.\d{1,9})?)([wx])\b")
_SVG = re.compile(r"\.svgz?$", re.IGNORECASE)
_FOR_A_SCRIPT = re.compile(r"[{\[]|.*(?:\{\{|\$\{|<%|\{[a-z_]+\})", re.DOTALL)  # JSON, templates: seen in data-src
# Types of sources that nothing here reads; the picture has another source or an <img> for those that do not either.
_UNREADABLE = (
    *("image/svg", "image/jxl", "image/heic", "image/heif", "image/jp2", "image/jpx", "image/jpm"),
    *("image/jxr", "image/vnd.ms-photo", "video/"),
)


@dataclass(frozen=True)
class PageImages:
    """Images of one page.

    Attributes:
        urls: Normalised, in the order of the page, each once.
        skipped: Reason → images without a usable address.
        opt_out: Why the page's images must not be used, see ``directives.opt_out_of``; None: they may.
    """

    urls: tuple[str, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    opt_out: str | None = None


def extract(html: str | bytes, page_url: str | None, agent_token: str = "", charset: str = "utf-8") -> PageImages:
    """Return the addresses of the images in a page, and whether the page forbids to use them.

    Args:
        html: The page; as bytes it is UTF-8.
        page_url: Where relative addresses start, unless the page has a ``<base>``; None: they are skipped.
        agent_token: Name under which pages may address us in a ``<meta>`` besides ``robots``.
        charset: That the page came in, see ``charset.decode_html``: queries are sent in it.

    Raises:
        LinkError: With reason ``bad_page`` where the page is built to take forever.
    """
    page = html.encode("utf-8", "replace") if isinstance(html, str) else html
    refuse_costly(page)
    found: dict[str, list[LexborNode]] = {"img": [], "base": [], "meta": []}
    for node in LexborHTMLParser(page).css("img, amp-img, base[href], meta[content]"):  # one walk over the tree
        found[node.tag if node.tag in ("base", "meta") else "img"].append(node)
    base = _base(found["base"], page_url, charset)
    urls: dict[str, None] = {}
    skipped: Counter[str] = Counter()
    for picture, nodes in _pictures(found["img"]):
        url = first_address(_candidates(picture, nodes), base, skipped, charset)
        if url is not None:
            urls.setdefault(url)
    metas = [
        (meta.get("name") or "", meta.get("content") or "") for meta in (node.attributes for node in found["meta"])
    ]
    return PageImages(tuple(urls), skipped, opt_out_of_metas(metas, agent_token))


def opt_out_of_metas(metas: Iterable[tuple[str, str]], agent_token: str) -> str | None:
    """Return what the ``<meta>`` of a page, given as name and content, say of its use; None: nothing against it."""
    named = [(name.strip().lower(), content) for name, content in metas]
    robots = [content for name, content in named if name in ("robots", agent_token.lower())]
    reserved = [content for name, content in named if name == "tdm-reservation" and content.strip() == "1"]
    return opt_out_of(robots, "1" if reserved else None, agent_token)


def _base(nodes: Sequence[LexborNode], page_url: str | None, charset: str) -> str | None:
    if not nodes:
        return page_url
    try:
        return normalise(nodes[0].attributes.get("href") or "", page_url, charset)
    except LinkError:
        return page_url  # like browsers: a broken first base counts as none


def first_address(
    candidates: Iterable[str], base: str | None, skipped: Counter[str], charset: str = "utf-8"
) -> str | None:
    """Return the first candidate that is an image's address, normalised.

    Args:
        candidates: Addresses of one image as written, best first.
        base: Where relative ones start.
        skipped: Counts why there is none: for the reason of the best candidate.
        charset: Of the page.
    """
    reason = "no_source"
    for text in candidates:
        text = text.strip()
        if not text:
            continue
        refused = _refused(text)
        if refused is None:
            try:
                url = normalise(text, base, charset)
            except LinkError as error:
                refused = error.reason
            else:
                if not _SVG.search(url.partition("?")[0]):
                    return url
                refused = "svg"
        if reason == "no_source":
            reason = refused
    skipped[reason] += 1
    return None


def _refused(text: str) -> str | None:
    head = text[:16].lower()
    if head[0] == "#":
        return "no_source"  # the page itself
    if _FOR_A_SCRIPT.match(text):
        return "bad_url"
    if not head.startswith("data:"):
        return None
    return "svg" if head.startswith("data:image/svg") else "data_uri"


def _pictures(nodes: Iterable[LexborNode]) -> Iterable[tuple[LexborNode | None, list[LexborNode]]]:
    """Return the images in order, each with the ``<picture>`` that it is in; several of one picture are one image."""
    found: dict[int, tuple[LexborNode | None, list[LexborNode]]] = {}
    for node in nodes:
        picture = node.parent
        if picture is not None and picture.tag == "noscript":
            picture = picture.parent
        if picture is None or picture.tag != "picture":
            found[node.mem_id] = (None, [node])
        else:
            found.setdefault(picture.mem_id, (picture, []))[1].append(node)
    return found.values()


def _candidates(picture: LexborNode | None, nodes: Sequence[LexborNode]) -> Iterator[str]:
    """Yield addresses of one image, best first."""
    found = [node.attributes for node in nodes]
    sources = [] if picture is None else _sources(picture)
    named = (attributes.get(name) or "" for attributes in found for name in (*LAZY_SRCSET, "srcset"))
    yield from _largest_first([*sources, *named])
    for name in LAZY_SRC:
        yield from (attributes.get(name) or "" for attributes in found)
    for attributes in reversed(found):  # what stands in <noscript> comes last, and a placeholder first
        yield attributes.get("src") or ""


def _sources(picture: LexborNode) -> Iterator[str]:
    """Yield the ``srcset`` of the sources of a picture."""
    for source in picture.css("source"):
        if not (source.attributes.get("type") or "").strip().lower().startswith(_UNREADABLE):
            for name in (*LAZY_SRCSET, "srcset"):
                yield source.attributes.get(name) or ""


def _largest_first(srcsets: list[str]) -> list[str]:
    found = [candidate for srcset in srcsets for candidate in parse_srcset(srcset)]
    # Sorting is stable: of equal candidates the first stays first. Widths say more than densities.
    found.sort(key=lambda candidate: (-candidate[1], -candidate[2]))
    return [url for url, _, _ in found]


def parse_srcset(srcset: str) -> list[tuple[str, float, float]]:
    """Return ``(url, width, density)`` of each candidate: width 0 where not given, density 1.

    Source:
        HTML Standard, "Parsing a srcset attribute".
    """
    candidates = []
    place = 0
    while found := _CANDIDATE.match(srcset, place):
        url, place = found[1], found.end()
        width, density = 0.0, 1.0
        if url.endswith(","):
            url = url.rstrip(",")
        else:
            end = _DESCRIPTOR_END.match(srcset, place)
            descriptor = end[0] if end else ""
            place += len(descriptor)
            for number, unit in _SIZE.findall(descriptor):
                width, density = (float(number), density) if unit == "w" else (width, float(number))
        if url:
            candidates.append((url, width, density))
    return candidates
