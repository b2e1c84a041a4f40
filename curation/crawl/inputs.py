"""The inputs of a run, as one stream of links."""

from collections.abc import Iterator, Sequence

from curation.config import InputConfig, RunConfig
from curation.crawl.links import Link
from curation.crawl.lists import read_urls
from curation.crawl.pages import read_html, visit_pages
from curation.crawl.sets import Report, list_folder, list_parquet, list_webdataset


def read_inputs(inputs: Sequence[InputConfig], config: RunConfig, report: Report) -> Iterator[Link]:
    """Yield the links of all inputs: inputs in order, their files sorted, their content from front to back.

    Args:
        inputs: What to read.
        config: Limits, and the rules under which live pages are visited.
        report: Called with a reason for each page, record, member or image that gave no link.

    Raises:
        InputError: If an input does not exist or cannot be read at all.
    """
    for source in inputs:
        yield from _read(source, config, report)


def _read(source: InputConfig, config: RunConfig, report: Report) -> Iterator[Link]:
    match source.kind:
        case "pages":
            yield from visit_pages(read_urls(source, report), config, report)
        case "html":
            yield from read_html(source, config, report)
        case "urls":
            yield from map(Link, read_urls(source, report))
        case "folder":
            yield from list_folder(source, report)
        case "webdataset":
            yield from list_webdataset(source, report)
        case "parquet":
            yield from list_parquet(source, report)
