"""Lists of URLs: text (one a line), CSV, TSV, Parquet, also compressed; read a batch at a time.

What a list says of an image besides its URL (caption, size, scores) is kept as ``extra``, see ``extra_columns``.
"""

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from typing import BinaryIO, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import RunConfig
from curation.config.inputs import InputConfig
from curation.crawl.bulk import normalise_all
from curation.crawl.csv_rows import cells_of, csv_rows, leaves_quote_open
from curation.crawl.extra_columns import to_json
from curation.crawl.links import web_links
from curation.crawl.sets import Report
from curation.crawl.sources import local_copy, open_source, suffix_of
from curation.errors import InputError

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".parquet", ".pq"})
# Names under which LAION, COYO, DataComp, Conceptual Captions, Open Images and others have the URL of an image, most
# telling first; case does not matter.
URL_COLUMNS = ("image_url", "img_url", "imageurl", "photo_image_url", "url", "originalurl", "contenturl", "image_src")

_BATCH_ROWS = 20_000
_MAX_LINE_CHARS = 1 << 16
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"\x04\x22": "lz4", b"BZ": "bz2"}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # "Unicode text" of spreadsheets
_DELIMITERS = ",;\t|"
T = TypeVar("T", str, list[str])

_URL = re.compile(r"\s*https?://", re.IGNORECASE)


def read_list(
    file: str, source: InputConfig, config: RunConfig, report: Report, row_groups: tuple[int, int] | None = None
) -> Iterator[pa.Table]:
    """Yield the links of a list in order, in batches; what is no URL is reported, such as ``bad_url``.

    Args:
        file: Path or URL.
        source: The input that it is of.
        config: Limits.
        report: Called with a reason for each row that gave no link.
        row_groups: Of a Parquet list: the first one, and the one behind the last; None: all.

    Raises:
        InputError: The list lacks ``url_column``, or no column looks like the one.
        OSError: It cannot be read.
    """
    for texts, columns in _batches(file, source, config, report, row_groups):
        urls = normalise_all(texts, report)
        extra = to_json(columns, len(texts))
        kept = urls.is_valid()
        if urls.null_count:
            urls, extra = urls.filter(kept), extra.filter(kept)
        if len(urls):
            yield web_links(urls, extra)


def read_urls(files: Iterable[str], source: InputConfig, config: RunConfig, report: Report) -> Iterator[str]:
    """Yield the normalised URLs of lists, or those that the settings give, without what else lists say."""
    if source.urls:
        yield from (url for url in normalise_all(pa.array(source.urls, pa.string()), report).to_pylist() if url)
        return
    for file in files:
        for table in read_list(file, source.model_copy(update={"columns": ()}), config, report):
            yield from table.column("url").to_pylist()


Batch = tuple[pa.Array, dict[str, pa.Array]]


def _batches(
    file: str, source: InputConfig, config: RunConfig, report: Report, row_groups: tuple[int, int] | None
) -> Iterator[Batch]:
    """Yield batches of URLs as written, and the further columns that are to be kept."""
    suffix = suffix_of(file)
    if suffix in (".parquet", ".pq"):
        with local_copy(file, config.crawl, config.fetch.user_agent) as path:
            yield from _of_parquet(str(path), file, source, row_groups)
        return
    with ExitStack() as stack:
        data = stack.enter_context(open_source(file, config.crawl, config.fetch.user_agent))
        stream = stack.enter_context(_text(data))
        if suffix in (".csv", ".tsv"):
            yield from _of_csv(file, stream, source, "\t" if suffix == ".tsv" else ",", report)
        else:
            # Browsers take tabs out of URLs, and would make one of all that a line says.
            for texts in _chunks(line.strip().partition("\t")[0] for line in _lines(stream, report)):
                yield pa.array(texts, pa.string()), {}


def _text(data: BinaryIO) -> TextIO:
    """Return a file as text, unpacked where its first bytes say that it is packed."""
    head = data.read(2)
    data.seek(0)
    codec = _PACKED.get(head)
    raw = data if codec is None else io.BufferedReader(pa.CompressedInputStream(data, codec))
    encoding = "utf-16" if head in _UTF_16 else "utf-8-sig"
    return io.TextIOWrapper(raw, encoding=encoding, errors="replace", newline="")


def _of_parquet(path: str, name: str, source: InputConfig, row_groups: tuple[int, int] | None) -> Iterator[Batch]:
    # Without a stream buffer whole column chunks are held: a row group of a million captions.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
        schema = parquet.schema_arrow
        fields = [field for field in schema if schema.names.count(field.name) == 1]  # others cannot be told apart
        texts = [field.name for field in fields if _may_be_text(field.type)]
        column = _url_column(name, [field.name for field in fields], texts, source)
        kept = _kept(name, [field.name for field in fields if not _is_binary(field.type)], column, source)
        groups = None if row_groups is None else list(range(*row_groups))
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[column, *kept]):
            urls = batch.column(column)
            urls = _decoded(urls) if _is_binary(urls.type) else _readable(urls).cast(pa.string())
            yield urls, {name: _readable(batch.column(name)) for name in kept}


def _readable(values: pa.Array) -> pa.Array:
    """Return text that is UTF-8, and other values as they are: Parquet promises UTF-8, and writers break it."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return values
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return _decoded(values.cast(pa.large_binary()))
    return values


def _decoded(values: pa.Array) -> pa.Array:
    texts = (None if data is None else data.decode("utf-8", "replace") for data in values.to_pylist())
    return pa.array(texts, pa.string())


def _may_be_text(kind: pa.DataType) -> bool:
    """Whether a column may be the URL's without being named in the settings; null is what writers make of no values."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(is_text or _is_binary(kind) or pa.types.is_null(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _of_csv(file: str, stream: TextIO, source: InputConfig, delimiter: str, report: Report) -> Iterator[Batch]:
    lines = _lines(stream, report)
    head = next((line for line in lines if line.strip()), None)
    if head is None:
        return
    delimiter = _delimiter(head, delimiter, source)
    header = cells_of(head, delimiter)
    if source.url_column is None and any(map(_URL.match, header)):  # Conceptual Captions has no header
        lines = chain([head], lines)
        place = next(place for place, cell in enumerate(header) if _URL.match(cell))
        header = [str(place) for place in range(len(header))]
        column = header[place]
        if source.columns:
            raise InputError(f"{file}: has no header, so there is no column {source.columns[0]}; leave out columns")
    elif leaves_quote_open(head, delimiter):
        raise InputError(f'{file}: the first line leaves a quote (") open, so its columns cannot be told')
    else:
        column = _url_column(file, header, header, source)
        place = header.index(column)
    kept = {name: header.index(name) for name in _kept(file, header, column, source)}

    def is_row(cells: list[str]) -> bool:
        return len(cells) >= len(header) and _URL.match(cells[place]) is not None

    rows = csv_rows(lines, delimiter, is_row, lambda: report("damaged_row"))
    for batch in _chunks(_rows(rows, place, report)):
        texts = pa.array([row[place] for row in batch], pa.string())
        yield (
            texts,
            {
                name: pa.array([(row[at] or None) if at < len(row) else None for row in batch])
                for name, at in kept.items()
            },
        )


def _delimiter(head: str, usual: str, source: InputConfig) -> str:
    """Return what splits a first line so that a cell is the URL column or a URL; the usual one where nothing does."""
    for delimiter in usual + _DELIMITERS:
        for cell in cells_of(head, delimiter):
            if cell == source.url_column:
                return delimiter
            if source.url_column is None and (cell.strip().lower() in URL_COLUMNS or _URL.match(cell)):
                return delimiter
    return usual


def _rows(rows: Iterable[list[str]], place: int, report: Report) -> Iterator[list[str]]:
    for row in rows:
        if place < len(row):
            yield row
        elif row:
            report("damaged_row")


def _chunks(rows: Iterator[T]) -> Iterator[list[T]]:
    """Yield batches; what was read before an error comes before it."""
    while True:
        batch: list[T] = []
        try:
            for row in islice(rows, _BATCH_ROWS):
                batch.append(row)  # noqa: PERF402  # a list made at once would be lost with the error
        except OSError:
            yield batch
            raise
        if not batch:
            return
        yield batch


def _lines(stream: TextIO, report: Report) -> Iterator[str]:
    """Yield lines; one that is too long for memory's sake is reported, not kept."""
    while line := stream.readline(_MAX_LINE_CHARS):
        if len(line) < _MAX_LINE_CHARS or line.endswith(("\n", "\r")):
            yield line
            continue
        report("damaged_row")
        while line and not line.endswith(("\n", "\r")):
            line = stream.readline(_MAX_LINE_CHARS)


def _url_column(file: str, names: Sequence[str], texts: Sequence[str], source: InputConfig) -> str:
    if source.url_column is not None:
        if source.url_column not in names:
            raise InputError(f"{file}: no column {source.url_column}; set url_column to one of: {_shown(names)}")
        return source.url_column
    by_name = {name.strip().lower(): name for name in reversed(texts)}
    found = next((by_name[name] for name in URL_COLUMNS if name in by_name), None)
    if found is None:
        raise InputError(f"{file}: no column url; set url_column to one of: {_shown(names)}")
    return found


def _kept(file: str, names: Sequence[str], column: str, source: InputConfig) -> list[str]:
    if source.columns is None:
        return [name for name in dict.fromkeys(names) if name != column]
    missing = [name for name in source.columns if name not in names]
    if missing:
        raise InputError(f"{file}: no column {missing[0]}; set columns to some of: {_shown(names)}")
    return [name for name in dict.fromkeys(source.columns) if name != column]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names)[:500]
