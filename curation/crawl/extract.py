"""The images that a page shows: one address for each ``<img>``, the largest on offer.

Of an image with ``srcset`` (or a ``<picture>`` with sources) the widest candidate is taken, of one that loads lazily
what it would load, and ``src`` otherwise. ``data:`` and SVG are skipped and counted.
"""

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser, LexborNode

from curation.crawl.urls import normalise
from curation.errors import LinkError

LAZY_SRCSET = ("data-srcset", "data-lazy-srcset", "data-original-set")
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
)

# lexbor is quadratic in the depth of the tree and in the attributes of a tag: 10,000 of either take 0.2 s, 40,000 take
# 3 s. The deepest of 130 real pages has, counted this crude way, 1,066 open tags.
MAX_OPEN_TAGS = 10_000
MAX_ATTRIBUTES = 5_000

_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_NOT_DEEPER = frozenset(  # void elements, and those that the next one closes
    (
        *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track"),
        *("wbr", "li", "p", "td", "th", "tr", "dt", "dd", "option"),
    )
)
_CANDIDATE = re.compile(r"[\s,]*([^\s]+)")
_DESCRIPTOR_END = re.compile(r"(?:[^,(]|\([^)]*\)?)*")
_SIZE = re.compile(r"\s(\d{1,9}(?:\.\d{1,9})?)([wx])\b")
_SVG = re.compile(r"\.svgz?$", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
# What browsers take these labels for (WHATWG Encoding Standard).
_ALIASES = {"iso-8859-1": "cp1252", "latin1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252"}
_ALIASES |= {"iso-8859-9": "cp1254", "tis-620": "cp874", "shift_jis": "cp932", "shift-jis": "cp932", "sjis": "cp932"}
_ALIASES |= {"gb2312": "gb18030", "gbk": "gb18030", "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "x-sjis": "cp932"}
_CHARSETS = re.compile(
    r"utf-?8|utf-16(le|be)?|iso-?8859-\d+|windows-?\d+|cp\d+|koi8-[ru]|gb18030|big5|euc-jp|iso-2022-jp"
)


@dataclass(frozen=True)
class PageImages:
    """Images of one page.

    Attributes:
        urls: Normalised, in the order of the page, each once.
        skipped: Reason → images without a usable address.
    """

    urls: tuple[str, ...]
    skipped: Counter[str] = field(default_factory=Counter)


def extract(html: str, page_url: str | None) -> PageImages:
    """Return the addresses of the images in a page.

    Args:
        html: The page.
        page_url: Where relative addresses start, unless the page has a ``<base>``; None: they are skipped.

    Raises:
        LinkError: With reason ``bad_page`` where the page is built to take forever.
    """
    _refuse_costly(html)
    tree = LexborHTMLParser(html)
    base = _base(tree, page_url)
    urls: dict[str, None] = {}
    skipped: Counter[str] = Counter()
    for node in tree.css("img, amp-img"):
        url = _address(node, base, skipped)
        if url is not None:
            urls.setdefault(url)
    return PageImages(tuple(urls), skipped)


def decode_html(data: bytes, content_type: str = "") -> str:
    """Decode a page by its byte order mark, its Content-Type, its ``<meta>``, as UTF-8, or as Windows-1252."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    header = _HEADER_CHARSET.search(content_type)
    charset = _charset(header[1]) if header else None
    if charset is None and (meta := _META_CHARSET.search(data[:4096])):
        charset = _charset(meta[1].decode("ascii"))
        if charset is not None and charset.startswith("utf-16"):
            charset = "utf-8"  # it was read as ASCII, so it is not UTF-16
    if charset is not None:
        return data.decode(charset, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "replace")
        is_cut = error.start >= max(4, len(data) - 3)  # in the middle of its last character
        few_errors = text.count("\ufffd") <= len(text) // 10_000
        return text if is_cut or few_errors else data.decode("cp1252", "replace")


def _charset(label: str) -> str | None:
    name = label.strip().lower()
    name = _ALIASES.get(name, name)
    if not _CHARSETS.fullmatch(name):
        return None
    try:
        return codecs.lookup(name).name
    except LookupError:
        return None


def _refuse_costly(html: str) -> None:
    depth = 0
    previous = 0
    for found in _TAG.finditer(html):
        if found[2].lower() not in _NOT_DEEPER:
            depth += -1 if found[1] else 1
        # Attributes hold no more equals signs and spaces than the stretch up to the next tag does.
        if (
            found.start() - previous > MAX_ATTRIBUTES
            and _num_attributes(html, previous, found.start()) > MAX_ATTRIBUTES
        ):
            raise LinkError("bad_page", "a tag with thousands of attributes")
        previous = found.start()
        if depth > MAX_OPEN_TAGS:
            raise LinkError("bad_page", f"more than {MAX_OPEN_TAGS} open tags")
    if _num_attributes(html, previous, len(html)) > MAX_ATTRIBUTES:
        raise LinkError("bad_page", "a tag with thousands of attributes")


def _num_attributes(html: str, start: int, stop: int) -> int:
    end = html.find(">", start, stop)
    return len(html[start : stop if end < 0 else end].split())


def _base(tree: LexborHTMLParser, page_url: str | None) -> str | None:
    for node in tree.css("base[href]"):
        try:
            return normalise(node.attributes.get("href") or "", page_url)
        except LinkError:
            break  # like browsers: a broken first base counts as none
    return page_url


def _address(node: LexborNode, base: str | None, skipped: Counter[str]) -> str | None:
    reason = "no_source"
    for text in _candidates(node):
        text = text.strip()
        if not text:
            continue
        refused = _refused(text)
        if refused is None:
            try:
                url = normalise(text, base)
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
    if head[0] in "{[":
        return "bad_url"  # JSON for a script, seen in data-src
    if not head.startswith("data:"):
        return None
    return "svg" if head.startswith("data:image/svg") else "data_uri"


def _candidates(node: LexborNode) -> Iterator[str]:
    """Yield addresses of one image, best first."""
    attributes = node.attributes
    yield from _largest_first([*_sources(node), *(attributes.get(name) or "" for name in (*LAZY_SRCSET, "srcset"))])
    for name in (*LAZY_SRC, "src"):
        yield attributes.get(name) or ""


def _sources(node: LexborNode) -> Iterator[str]:
    """Yield the ``srcset`` of the sources of the picture around an image."""
    picture = node.parent
    if picture is None or picture.tag != "picture":
        return
    for source in picture.css("source"):
        if not (source.attributes.get("type") or "").strip().lower().startswith("image/svg"):
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
