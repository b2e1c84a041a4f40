"""Which links of a later list are new."""

import pytest

from curation.crawl.known import KnownUrls


def urls(numbers):
    return [f"https://host{n % 7}.example/{n}.jpg" for n in numbers]


def test_links_that_are_there_are_known_and_the_others_new_in_their_order(tmp_path):
    known = KnownUrls(tmp_path / "known")
    known.add(urls(range(0, 5000, 2)))
    known.add(urls(range(5000, 6000)))
    asked = urls(range(5999, -1, -1))

    lacks = known.lacks(asked)

    assert [url for url, is_new in zip(asked, lacks, strict=True) if is_new] == urls(range(4999, 0, -2))


def test_nothing_is_known_at_first(tmp_path):
    known = KnownUrls(tmp_path / "known")

    assert known.lacks(["https://a.example/"]).tolist() == [True]


def test_urls_cannot_be_added_behind_the_first_question(tmp_path):
    known = KnownUrls(tmp_path / "known")
    known.lacks([])

    with pytest.raises(ValueError, match="cannot be added"):
        known.add(["https://a.example/"])
