"""Which links of a later list are new."""

import pyarrow as pa
import pytest

from curation.crawl.known import KnownUrls


def urls(numbers):
    return [f"https://host{n % 7}.example/{n}.jpg" for n in numbers]


def test_links_that_are_there_are_known_and_the_others_new_in_their_order(tmp_path):
    known = KnownUrls(tmp_path / "known")
    known.add(urls(range(0, 5000, 2)))
    known.add(urls(range(5000, 6000)))
    table = pa.table({"url": urls(range(5999, -1, -1)), "number": range(5999, -1, -1)})

    found = pa.concat_tables(known.new([table.slice(0, 10), table.slice(10)]))

    assert found.column("number").to_pylist() == list(range(4999, 0, -2))


def test_nothing_is_known_at_first(tmp_path):
    known = KnownUrls(tmp_path / "known")

    assert [table.num_rows for table in known.new([pa.table({"url": urls(range(3))})])] == [3]


def test_urls_cannot_be_added_behind_the_first_question(tmp_path):
    known = KnownUrls(tmp_path / "known")
    list(known.new([]))

    with pytest.raises(ValueError, match="cannot be added"):
        known.add(["https://a.example/"])
