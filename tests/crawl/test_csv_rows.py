"""A quote that was left open costs no row."""

import csv
import io
import operator
import random

import pytest

from curation.crawl.csv_rows import csv_rows, leaves_quote_open


def is_row(cells):
    return len(cells) >= 2 and cells[0].startswith("http")


def rows(text):
    """Return the rows, and how many lines were damaged."""
    damaged = []
    found = list(csv_rows(iter(text.splitlines(keepends=True)), ",", is_row, lambda: damaged.append(1)))
    return found, len(damaged)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('http://a,x\nhttp://b,"y\nz"\nhttp://c,w', [["http://a", "x"], ["http://b", "y\nz"], ["http://c", "w"]]),
        ('http://a,"x\nhttp://n\ny"\nhttp://b,x', [["http://a", "x\nhttp://n\ny"], ["http://b", "x"]]),
        ('http://a,"x\nhttp://b,y\nhttp://c,z', [["http://a", "x"], ["http://b", "y"], ["http://c", "z"]]),
        ('http://a,"x\nhttp://b,y\nhttp://c,"z, w"\n', [["http://a", "x"], ["http://b", "y"], ["http://c", "z, w"]]),
        ('http://a,"x\nhttp://b,"y\nz"\nhttp://c,w', [["http://a", "x"], ["http://b", "y\nz"], ["http://c", "w"]]),
        ('http://c,\n"http://a,x\nhttp://b,y\n', [["http://c", ""], ["http://b", "y"]]),
        ('http://a,5" x 7"\nhttp://b,"6"" x 8"', [["http://a", '5" x 7"'], ["http://b", '6" x 8']]),
        ('http://a,"x\r\n\r\nhttp://b,y\r\n', [["http://a", "x"], ["http://b", "y"]]),
    ],
)  # fmt: skip
def test_rows_of_several_lines_are_whole_and_swallow_no_others(text, expected):
    assert rows(text) == (expected, text.count('"http'))


def test_one_quote_anywhere_in_a_file_costs_its_own_row_at_most():
    drawn = random.Random(0)
    captions = ["plain", "with, comma", 'a "quoted" word', "two\nlines", "", 'ends in "quotes"']
    for _ in range(300):
        stream = io.StringIO()
        urls = [f"http://site.example/{number}" for number in range(12)]
        csv.writer(stream).writerows([url, drawn.choice(captions)] for url in urls)
        text = stream.getvalue()
        place = drawn.randrange(len(text))

        found, _ = rows(text[:place] + '"' + text[place:])

        lost = set(urls) - {row[0].replace('"', "") for row in found if row}
        assert len(lost) <= 1, (place, text)


def test_quotes_that_never_close_cost_neither_memory_nor_quadratic_time():
    line = 'x.example/,"y","z\n'
    lines = iter(['http://x.example/,"y\n', *[line] * 200_000])
    damaged = []

    found = csv_rows(lines, ",", is_row, lambda: damaged.append(1))

    assert next(found) == ["http://x.example/", "y"]
    assert operator.length_hint(lines) >= 200_000 - (1 << 20) // len(line) - 1
    assert list(found) == []
    assert len(damaged) == 200_000


def test_a_line_says_whether_it_goes_on():
    assert [leaves_quote_open(line, ",") for line in ('a,"b"\n', 'a,"b\n', 'a,b"\n', '"a""\n', '"a""b"')] == [
        *(False, True, False, True, False)
    ]
