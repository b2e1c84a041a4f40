"""Image links from WAT files: what Common Crawl found in its pages, without the pages.

A record holds one page's links as JSON. Each ``IMG`` gives one link an attribute, so that unlike in ``extract`` its
``src`` and its ``srcset`` may both be there; ``<picture>`` is not told from its sources, which are left out. The
charset of a page is not told either: queries are encoded as UTF-8.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pydantic_core

from curation.config import RunConfig
from curation.crawl.archives import Record, read_records
from curation.crawl.directives import opt_out_of
from curation.crawl.extract import LAZY_SRC, LAZY_SRCSET, PageImages, first_address, opt_out_of_metas, parse_srcset
from curation.crawl.links import Link
from curation.crawl.robots import product_token
from curation.crawl.sets import Report
from curation.crawl.sources import open_source
from curation.crawl.urls import normalise
from curation.errors import LinkError

_ELEMENTS = frozenset({"IMG", "AMP-IMG"})
_SRC = frozenset({"src", *LAZY_SRC})
_SRCSET = frozenset({"srcset", *LAZY_SRCSET})
_WAT_RECORDS = frozenset({"metadata"})


def read_wat(file: str, config: RunConfig, report: Report) -> Iterator[Link]:
    """Yield the image links of a WAT file.

    A page that fails is reported as ``page_<reason>``, a record without the expected JSON as ``record_damaged``.

    Raises:
        OSError: The file cannot be read.
    """
    token = product_token(config.fetch.user_agent)
    with open_source(file, config.crawl, config.fetch.user_agent) as stream:
        for record in read_records(stream, _WAT_RECORDS, config.crawl.max_page_bytes, report):
            answer = _answer(record, report)
            if answer is None:
                continue
            status = _text(_mapping(answer, "Response-Message").get("Status"))
            if status and not status.startswith("2"):
                report(f"page_http_{status[:3]}")
                continue
            try:
                page_url = normalise(record.url)
            except LinkError as error:
                report(f"page_{error.reason}")
                continue
            images = _images(answer, page_url, token)
            for reason, count in images.skipped.items():
                for _ in range(count):
                    report(reason)
            for url in images.urls:
                yield Link(url, (page_url,), opt_out=images.opt_out)


def _answer(record: Record, report: Report) -> Mapping[str, Any] | None:
    """Return the part of a record that describes an HTTP answer, if there is one."""
    if b"HTTP-Response-Metadata" not in record.body:
        return None
    try:
        tree = _parsed(record.body)
    except (ValueError, RecursionError):
        report("record_damaged")
        return None
    found = _mapping(tree, "Envelope", "Payload-Metadata", "HTTP-Response-Metadata")
    return found or None


def _parsed(body: bytes) -> Any:
    try:
        return pydantic_core.from_json(body)
    except ValueError:  # half a surrogate pair, or bytes of a page that are no UTF-8, need not cost its other links
        return json.loads(body.decode("utf-8", "replace"))


def _images(answer: Mapping[str, Any], page_url: str, token: str) -> PageImages:
    html = _mapping(answer, "HTML-Metadata")
    head = _mapping(html, "Head")
    base = page_url
    with suppress(LinkError):  # like browsers: a broken base counts as none
        base = normalise(_text(head.get("Base")), page_url)
    urls: dict[str, None] = {}
    skipped: Counter[str] = Counter()
    for link in _entries(html.get("Links")):
        candidates = _candidates(link)
        if candidates is not None and (url := first_address(candidates, base, skipped)) is not None:
            urls.setdefault(url)
    return PageImages(tuple(urls), skipped, _opt_out(answer, head, token))


def _candidates(link: Mapping[str, Any]) -> list[str] | None:
    """Return the addresses that a link offers, best first; None where it is no image's."""
    element, _, attribute = _text(link.get("path")).partition("@/")
    if element.upper() not in _ELEMENTS or attribute not in _SRC | _SRCSET:
        return None
    srcset = " ".join([_text(link.get("srcset")), _text(link.get("url")) if attribute in _SRCSET else ""])
    offers = sorted(parse_srcset(srcset), key=lambda offer: (-offer[1], -offer[2]))
    return [url for url, _, _ in offers] + ([_text(link.get("url"))] if attribute in _SRC else [])


def _opt_out(answer: Mapping[str, Any], head: Mapping[str, Any], token: str) -> str | None:
    headers = {name.lower(): value for name, value in _mapping(answer, "Headers").items()}
    robots = headers.get("x-robots-tag", [])
    values = [_text(value) for value in (robots if isinstance(robots, list) else [robots])]
    metas = [(_text(meta.get("name")), _text(meta.get("content"))) for meta in _entries(head.get("Metas"))]
    found = (opt_out_of_metas(metas, token), opt_out_of(values, _text(headers.get("tdm-reservation")), token))
    return min((reason for reason in found if reason is not None), default=None)


def _mapping(tree: Any, *names: str) -> Mapping[str, Any]:
    """Return the mapping under a path of names; an empty one where anything else is there."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def _entries(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list):
        yield from (entry for entry in value if isinstance(entry, Mapping))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
