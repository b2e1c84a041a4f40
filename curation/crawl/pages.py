"""Pages to links: visited live, or saved as files."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from curation.config import InputConfig, RunConfig
from curation.crawl.client import Answer, Client
from curation.crawl.extract import PageImages, decode_html, extract
from curation.crawl.fetcher import Visitor
from curation.crawl.links import Link
from curation.crawl.sets import Report
from curation.crawl.urls import normalise
from curation.errors import InputError, LinkError
from curation.local_files import expand

_ACCEPT_PAGES = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1"
_HTML_SUFFIXES = frozenset({".html", ".htm", ".xhtml"})
_PAGES_AT_A_TIME = 1024


def visit_pages(urls: Iterable[str], config: RunConfig, report: Report) -> Iterator[Link]:
    """Visit pages under the rules of ``config.fetch`` and yield their images, in the order of ``urls``.

    A page that fails is reported as ``page_<reason>``.
    """
    visitor: Visitor[PageImages] = Visitor(
        config.fetch,
        client=lambda: Client(config.fetch, config.crawl.max_page_bytes, _ACCEPT_PAGES, cut=True),
        check=_images_of_answer,
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


def read_html(source: InputConfig, config: RunConfig, report: Report) -> Iterator[Link]:
    """Yield the images of saved pages.

    With ``base_url`` the page of a file is its path relative to the folder, seen from that URL (``base_url`` itself for
    a single file). Without, it is the file's own URL, and relative addresses need a ``<base>`` in the page.

    Raises:
        InputError: If there is nothing to read.
    """
    files, folder = expand(source.path, _HTML_SUFFIXES, "html")
    base_url = _base_url(source)
    is_file = Path(source.path).expanduser().is_file()
    for file in files:
        page_url = None
        try:
            with file.open("rb") as stream:
                data = stream.read(config.crawl.max_page_bytes)
            if base_url is not None:
                page_url = base_url if is_file else normalise(quote(file.relative_to(folder).as_posix()), base_url)
            images = extract(decode_html(data), page_url)
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


def _images_of_answer(answer: Answer) -> PageImages:
    kind = answer.content_type.partition(";")[0].strip().lower()
    if kind and kind not in ("text/html", "application/xhtml+xml"):
        raise LinkError("not_html", kind, answer.status)
    return extract(decode_html(answer.body, answer.content_type), str(answer.url))


def _links(images: PageImages, page_url: str, report: Report) -> list[Link]:
    for reason, count in Counter(images.skipped).items():
        for _ in range(count):
            report(reason)
    return [Link(url, (page_url,)) for url in images.urls]
