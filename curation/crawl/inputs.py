"""The inputs of a run, as parts that can be read apart, and as one stream of links.

A part is a few files of one input, the same ones for any number of workers. What it gives depends on it alone.
"""

import gzip
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import RunConfig
from curation.config.inputs import InputConfig
from curation.crawl.img2dataset import SUFFIXES as IMG2DATASET_SUFFIXES
from curation.crawl.img2dataset import read_output
from curation.crawl.links import Link, from_table, to_table
from curation.crawl.lists import LIST_SUFFIXES, read_list, read_urls
from curation.crawl.pages import HTML_SUFFIXES, read_html, read_warc, visit_pages
from curation.crawl.sets import Report, list_folder, list_parquet, list_tar
from curation.crawl.sources import RemoteError, files_of, is_remote, open_source, suffix_of
from curation.crawl.wat import read_wat
from curation.errors import InputError
from curation.local_files import expand

_SUFFIXES = {
    "pages": LIST_SUFFIXES,
    "urls": LIST_SUFFIXES,
    "html": HTML_SUFFIXES,
    "warc": frozenset({".warc"}),
    "wat": frozenset({".wat"}),
    "img2dataset": IMG2DATASET_SUFFIXES,
    "webdataset": frozenset({".tar"}),
    "parquet": frozenset({".parquet", ".pq"}),
}
_FILES_A_PART = {"html": 2_000, "img2dataset": 1_000, "webdataset": 10, "parquet": 10}  # of the others one
_PAGES_A_PART = 10_000
_LIST_ROWS_A_PART = 1_000_000  # of Parquet lists; text is read whole
_MANY_FILES = 256  # so many lists keep all workers busy as they are
_LISTING = ".paths"
_MAX_LISTING_BYTES = 1 << 30
_BATCH_ROWS = 10_000

T = TypeVar("T")


@dataclass(frozen=True)
class InputPart:
    """What is read at once.

    Attributes:
        source: Position of the input in the settings.
        files: Paths or URLs; none where the settings themselves list URLs, or the input is a folder of images.
        is_only: They are all that the input has: when they cannot be read there is nothing to go on with.
        folder: Below which the files lie; empty where that does not matter.
        first: Of a list of pages, the first one to visit.
        row_groups: Of the one file, a Parquet list: the first row group, and the one behind the last; None: all.
        in_turn: Asks hosts for pages: it must not be read beside other such parts, so that hosts are asked politely.
    """

    source: int
    files: tuple[str, ...]
    is_only: bool
    folder: str = ""
    first: int = 0
    row_groups: tuple[int, int] | None = None
    in_turn: bool = False


def split(inputs: Sequence[InputConfig], config: RunConfig) -> list[InputPart]:
    """Return the parts of all inputs: inputs in order, their files sorted or as listed.

    Raises:
        InputError: If an input does not exist.
    """
    return [part for place, source in enumerate(inputs) for part in _parts(place, source, config)]


def read_part(part: InputPart, source: InputConfig, config: RunConfig, report: Report) -> Iterator[pa.Table]:
    """Yield the links of a part in order, as tables with the columns of ``schema.CRAWL``.

    Args:
        part: Of ``split``.
        source: The input that it is of.
        config: Limits, and the rules under which live pages are visited.
        report: Called with a reason for each page, record, member or image that gave no link.

    Raises:
        InputError: If the input cannot be read at all.
    """
    if source.kind == "urls" and not source.urls:
        for file in part.files:
            yield from _or_reason(part, file, read_list(file, source, config, report, part.row_groups), report)
        return
    links = _links(part, source, config, report)
    while batch := list(itertools.islice(links, _BATCH_ROWS)):
        yield to_table(batch)


def read_inputs(inputs: Sequence[InputConfig], config: RunConfig, report: Report) -> Iterator[Link]:
    """Yield the links of all inputs: inputs in order, their files sorted, their content from front to back.

    Args:
        inputs: What to read.
        config: Limits, and the rules under which live pages are visited.
        report: Called with a reason for each page, record, member or image that gave no link.

    Raises:
        InputError: If an input does not exist or cannot be read at all.
    """
    for part in split(inputs, config):
        for table in read_part(part, inputs[part.source], config, report):
            yield from from_table(table)


def _parts(place: int, source: InputConfig, config: RunConfig) -> Iterator[InputPart]:
    if source.kind == "pages":
        yield from _page_parts(place, source, config)
        return
    if source.urls or source.kind == "folder":
        yield InputPart(place, (), True)
        return
    folder = ""
    if source.kind in ("html", "webdataset", "parquet", "img2dataset"):  # local only
        found, below = expand(source.path, _SUFFIXES[source.kind], source.kind)
        files, folder = [str(file) for file in found], str(below)
    elif suffix_of(source.path) == _LISTING and source.kind in ("warc", "wat"):
        files = list(_listed(source, config))
    else:
        files = files_of(source.path, _SUFFIXES[source.kind], source.kind)
    if source.kind == "urls" and len(files) < _MANY_FILES:
        for file in files:
            for row_groups in _row_groups(file):
                yield InputPart(place, (file,), len(files) == 1, row_groups=row_groups)
        return
    size = _FILES_A_PART.get(source.kind, 1)
    for start in range(0, len(files), size):
        yield InputPart(place, tuple(files[start : start + size]), len(files) == 1, folder)


def _row_groups(file: str) -> list[tuple[int, int] | None]:
    """Return row groups of a large Parquet list that are read together; of any other file None, which means all."""
    if is_remote(file) or suffix_of(file) not in (".parquet", ".pq"):
        return [None]
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return [None]  # whoever reads it says what is wrong
    found: list[tuple[int, int] | None] = []
    first = num_rows = 0
    for group in range(metadata.num_row_groups):
        num_rows += metadata.row_group(group).num_rows
        if num_rows >= _LIST_ROWS_A_PART or group == metadata.num_row_groups - 1:
            found.append((first, group + 1))
            first, num_rows = group + 1, 0
    return found if len(found) > 1 else [None]


def _page_parts(place: int, source: InputConfig, config: RunConfig) -> Iterator[InputPart]:
    files = [] if source.urls else files_of(source.path, LIST_SUFFIXES, source.kind)
    num_pages = sum(1 for _ in read_urls(files, source, config, lambda reason: None))
    for first in range(0, max(1, num_pages), _PAGES_A_PART):
        yield InputPart(place, tuple(files), len(files) < 2, first=first, in_turn=True)


def _listed(source: InputConfig, config: RunConfig) -> Iterator[str]:
    """Yield what a listing of Common Crawl names, one path a line, as seen from the mirror."""
    mirror = source.mirror if is_remote(source.mirror) else str(Path(source.mirror).expanduser().absolute())
    try:
        (file,) = files_of(source.path, frozenset(), source.kind)
        with open_source(file, config.crawl, config.fetch.user_agent) as stream:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            data = gzip.GzipFile(fileobj=stream).read(_MAX_LISTING_BYTES) if packed else stream.read(_MAX_LISTING_BYTES)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{source.kind} {source.path}: the listing cannot be read: {error}") from error
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    if not any(lines):
        raise InputError(f"{source.kind} {source.path}: the listing is empty")
    for line in filter(None, lines):
        yield line if is_remote(line) else f"{mirror.rstrip('/')}/{line.lstrip('/')}"


def _links(part: InputPart, source: InputConfig, config: RunConfig, report: Report) -> Iterator[Link]:
    if source.kind == "folder":
        yield from list_folder(source, report)
    elif source.kind == "pages":
        said = report if part.first == 0 else lambda reason: None  # of the list, which every part reads
        pages = itertools.islice(read_urls(part.files, source, config, said), part.first, part.first + _PAGES_A_PART)
        yield from visit_pages(pages, config, report)
    elif source.kind == "html":
        yield from read_html([Path(file) for file in part.files], Path(part.folder), source, config, report)
    elif source.urls:
        yield from map(Link, read_urls((), source, config, report))
    for file in part.files:
        match source.kind:
            case "warc":
                yield from _or_reason(part, file, read_warc(file, config, report), report)
            case "wat":
                yield from _or_reason(part, file, read_wat(file, config, report), report)
            case "img2dataset":
                yield from _or_reason(part, file, read_output(file, source, report), report)
            case "webdataset":
                yield from list_tar(Path(file), report, part.is_only)
            case "parquet":
                yield from list_parquet(Path(file), source, report, part.is_only)


def _or_reason(part: InputPart, file: str, items: Iterable[T], report: Report) -> Iterator[T]:
    """Yield items; a file that cannot be read up to its end is counted.

    Raises:
        InputError: It is all there is, and gives nothing, or stops to come: running again may give the rest.
    """
    is_started = False
    try:
        for item in items:
            is_started = True
            yield item
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if part.is_only and (not is_started or isinstance(error, RemoteError)):
            raise InputError(f"{file}: cannot be read: {error}") from error
        report("file_unreadable")
