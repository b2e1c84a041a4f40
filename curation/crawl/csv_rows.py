"""Rows of CSV files whose quotes cannot be trusted.

A quoted cell may go on over lines, and captions do. A quote that somebody left open looks the same, and would make one
cell of all rows up to the next quote. So where a line of a row of several lines is a row by itself, a quote was left
open, and each line is a row or is damaged.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

_MAX_ROW_CHARS = 1 << 20  # in lines; one cell may have csv.field_size_limit(), an eighth of it
_END = ""  # behind the last line; lines have ends, so that none is empty

Row = list[str]


def csv_rows(
    lines: Iterator[str], delimiter: str, is_row: Callable[[Row], object], damaged: Callable[[], None]
) -> Iterator[Row]:
    """Yield the rows of a file; none swallows others, and no line is read more than three times.

    Args:
        lines: With their ends, none longer than memory likes.
        delimiter: Between cells.
        is_row: Whether the cells of one line are surely a row.
        damaged: Called for each line that gives none.
    """
    read: list[str] = []  # the lines of the row at hand
    again: list[str] = []
    while True:
        try:
            for row in csv.reader(_noted(chain(again, lines, [_END]), read), delimiter=delimiter):
                if len(read) > 1:
                    if read[-1] == _END or any(is_row(cells_of(line, delimiter)) for line in read[1:]):
                        again = [read.pop()]  # in it a quote was met again: it may begin a row of several lines
                        break
                elif read[0] == _END:
                    return
                read.clear()
                yield row
        except csv.Error:  # a cell, or a row, without end
            again = []
        for line in read:
            row = cells_of(line, delimiter)
            if is_row(row):
                yield row
            elif row:
                damaged()
        read.clear()


def cells_of(line: str, delimiter: str) -> Row:
    """Return the cells of one line, whatever its quotes."""
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])


def leaves_quote_open(line: str, delimiter: str) -> bool:
    """Return whether the last cell of a line goes on in the next one."""
    return sum(1 for _ in csv.reader([line, ""], delimiter=delimiter)) == 1


def _noted(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """Yield lines as they are asked for, and note them.

    Raises:
        csv.Error: Too much is noted.
    """
    num_chars = 0
    for line in lines:
        num_chars = num_chars + len(line) if read else 0
        read.append(line)
        if num_chars > _MAX_ROW_CHARS:
            raise csv.Error("a row without end")
        yield line
