"""Pages to links: visited live, saved as files, or archived."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from curation.config import RunConfig
from curation.config.inputs import InputConfig
from curation.crawl import payload
from curation.crawl.archives import Record, read_records
from curation.crawl.charset import decode_html
from curation.crawl.directives import opt_out_of
from curation.crawl.extract import PageImages, extract
from curation.crawl.links import Link
from curation.crawl.robots import product_token
from curation.crawl.sets import Report
from curation.crawl.sources import open_source
from curation.crawl.urls import normalise
from curation.errors import InputError, LinkError

if TYPE_CHECKING:
    from curation.crawl.client import Answer

_PAGE_RECORDS = frozenset({"response", "resource"})
_HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
_VAGUE_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream", "text/plain", "application/http"})
_SNIFFED_BYTES = 1024
_LOOKS_LIKE_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|script|table|div|meta|title|img|a|p|h1|b|br)\b",
    re.IGNORECASE | re.DOTALL,
)
_TDM = "tdm-reservation"
_ACCEPT_PAGES = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1"
HTML_SUFFIXES = frozenset({".html", ".htm", ".xhtml"})
_PAGES_AT_A_TIME = 1024


def visit_pages(urls: Iterable[str], config: RunConfig, report: Report) -> Iterator[Link]:
    """Visit pages under the rules of ``config.fetch`` and yield their images, in the order of ``urls``.

    A page that fails is reported as ``page_<reason>``.
    """
    from curation.crawl.client import Client  # an HTTP client takes a while to import
    from curation.crawl.visitor import Visitor

    visitor: Visitor[PageImages] = Visitor(
        config.fetch,
        client=lambda: Client(config.fetch, config.crawl.max_page_bytes, _ACCEPT_PAGES, cut=True, refuse_opt_out=False),
        check=partial(_images_of_answer, config),
        num_threads=config.images.decode_threads,
    )
    remaining = iter(urls)
    while chunk := list(islice(remaining, _PAGES_AT_A_TIME)):
        pages: dict[int, list[Link]] = {}
        for visited in visitor.visit(chunk):
            if visited.error is not None:
                report(f"page_{visited.error.reason}")
            elif visited.value is not None and visited.answer is not None:
                pages[visited.index] = _links(visited.value, str(visited.answer.url), report)
        for index in sorted(pages):
            yield from pages[index]


def read_html(
    files: Sequence[Path], folder: Path, source: InputConfig, config: RunConfig, report: Report
) -> Iterator[Link]:
    """Yield the images of saved pages.

    With ``base_url`` the page of a file is its path relative to the folder, seen from that URL (``base_url`` itself for
    a single file). Without, it is the file's own URL, and relative addresses need a ``<base>`` in the page.

    Args:
        files: Pages.
        folder: That they lie in or below.
        source: The input.
        config: Limits.
        report: Called with a reason for each page and image that gave no link.
    """
    base_url = _base_url(source)
    is_file = Path(source.path).expanduser().is_file()
    for file in files:
        page_url = None
        try:
            with file.open("rb") as stream:
                data = stream.read(config.crawl.max_page_bytes)
            if base_url is not None:
                page_url = base_url if is_file else normalise(quote(file.relative_to(folder).as_posix()), base_url)
            images = _page(data, "", page_url, config, (), None)
        except OSError:
            report("page_unreadable")
        except LinkError as error:
            report(f"page_{error.reason}")
        else:
            yield from _links(images, page_url or file.as_uri(), report)


def _base_url(source: InputConfig) -> str | None:
    try:
        return normalise(source.base_url) if source.base_url else None
    except LinkError as error:
        raise InputError(f"html {source.path}: base_url {source.base_url}: {error.detail}") from error


def read_warc(file: str, config: RunConfig, report: Report) -> Iterator[Link]:
    """Yield the images of the pages in a WARC file.

    A page that fails is reported as ``page_<reason>``, records as ``archives.read_records`` says.

    Raises:
        OSError: The file cannot be read.
    """
    with open_source(file, config.crawl, config.fetch.user_agent) as stream:
        for record in read_records(stream, _PAGE_RECORDS, config.crawl.max_page_bytes, report):
            if record.status is not None and not 200 <= record.status < 300:
                report(f"page_http_{record.status}")
                continue
            try:
                images, page_url = _images_of_record(record, config, report)
            except LinkError as error:
                report(f"page_{error.reason}")
            else:
                yield from _links(images, page_url, report)


def _images_of_record(record: Record, config: RunConfig, report: Report) -> tuple[PageImages, str]:
    limit = config.crawl.max_page_bytes
    body, is_whole = payload.decode(
        record.body, record.header("transfer-encoding"), record.header("content-encoding"), limit
    )
    if not is_whole:
        report("payload_damaged")
    _refuse_other(record.content_type, body)
    page_url = normalise(record.url)
    return _page(
        body, record.content_type, page_url, config, record.all_of("x-robots-tag"), record.header(_TDM)
    ), page_url


def _refuse_other(content_type: str, body: bytes) -> None:
    """Refuse what is no HTML. Servers that say nothing, or that it is bytes or plain text, are asked of the bytes."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in _HTML_TYPES:
        return
    if kind not in _VAGUE_TYPES or _LOOKS_LIKE_HTML.match(body[:_SNIFFED_BYTES]) is None:
        raise LinkError("not_html", kind)


def _page(
    body: bytes, content_type: str, page_url: str | None, config: RunConfig, robots: Sequence[str], tdm: str | None
) -> PageImages:
    """Extract a page's images; what its headers say of its use counts like what it says itself."""
    token = product_token(config.fetch.user_agent)
    html, charset = decode_html(body, content_type)
    images = extract(html, page_url, token, charset)
    return replace(images, opt_out=_first(images.opt_out, opt_out_of(robots, tdm, token)))


def _first(*reasons: str | None) -> str | None:
    return min((reason for reason in reasons if reason is not None), default=None)


def _images_of_answer(config: RunConfig, answer: "Answer") -> PageImages:
    kind = answer.content_type.partition(";")[0].strip().lower()
    if kind and kind not in _HTML_TYPES:
        raise LinkError("not_html", kind, answer.status)
    images = _page(answer.body, answer.content_type, str(answer.url), config, (), None)
    return replace(images, opt_out=_first(images.opt_out, answer.opt_out))


def _links(images: PageImages, page_url: str, report: Report) -> list[Link]:
    for reason, count in Counter(images.skipped).items():
        for _ in range(count):
            report(reason)
    return [Link(url, (page_url,), opt_out=images.opt_out) for url in images.urls]
