"""Lists of URLs: text (one a line), CSV, Parquet."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import InputConfig
from curation.crawl.sets import Report
from curation.crawl.urls import normalise
from curation.errors import InputError, LinkError
from curation.local_files import expand

_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".parquet", ".pq"})
_MAX_LINE_CHARS = 1 << 16


def read_urls(source: InputConfig, report: Report) -> Iterator[str]:
    """Yield the normalised URLs of a list, in order; what is no URL is reported as ``bad_url``.

    Raises:
        InputError: If a list cannot be read or lacks ``url_column``.
    """
    for text in _texts(source, report):
        text = text.strip()
        if not text:
            continue
        try:
            yield normalise(text)
        except LinkError as error:
            report(error.reason)


def _texts(source: InputConfig, report: Report) -> Iterator[str]:
    if source.urls:
        yield from source.urls
        return
    files, _ = expand(source.path, _SUFFIXES, source.kind)
    for file in files:
        try:
            yield from _of_file(file, source.url_column, report)
        except (OSError, pa.ArrowException) as error:
            if len(files) == 1:
                raise InputError(f"{source.kind} {file}: cannot be read: {error}") from error
            report("damaged_list")


def _of_file(file: Path, column: str, report: Report) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix in (".parquet", ".pq"):
        yield from _of_parquet(file, column)
        return
    with file.open(
        encoding="utf-8-sig", errors="replace", newline="" if suffix in (".csv", ".tsv") else None
    ) as stream:
        if suffix in (".csv", ".tsv"):
            yield from _of_csv(file, stream, column, "\t" if suffix == ".tsv" else ",", report)
        else:
            yield from _lines(stream, report)


def _of_parquet(file: Path, column: str) -> Iterator[str]:
    with pq.ParquetFile(file) as parquet:
        if column not in parquet.schema_arrow.names:
            raise InputError(_no_column(file, column, parquet.schema_arrow.names))
        for batch in parquet.iter_batches(4096, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield value if isinstance(value, str) else ""


def _of_csv(file: Path, stream: TextIO, column: str, delimiter: str, report: Report) -> Iterator[str]:
    rows = csv.reader(_lines(stream, report), delimiter=delimiter)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise InputError(f"{file}: the first line is not CSV: {error}") from error
    if column not in header:
        raise InputError(_no_column(file, column, header))
    place = header.index(column)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            report("damaged_row")
            continue
        if place < len(row):
            yield row[place]
        elif row:
            report("damaged_row")


def _lines(stream: TextIO, report: Report) -> Iterator[str]:
    """Yield lines; one that is too long for memory's sake is reported, not kept."""
    while line := stream.readline(_MAX_LINE_CHARS):
        if len(line) < _MAX_LINE_CHARS or line.endswith("\n"):
            yield line
            continue
        report("damaged_row")
        while line and not line.endswith("\n"):
            line = stream.readline(_MAX_LINE_CHARS)


def _no_column(file: Path, column: str, names: list[str]) -> str:
    return f"{file}: no column {column}; set url_column to one of: {', '.join(names)[:500]}"
