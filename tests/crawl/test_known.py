"""Which links of a later list are new."""

import pytest

from curation.crawl.known import KnownUrls
from curation.crawl.links import Link


def urls(numbers):
    return [f"https://host{n % 7}.example/{n}.jpg" for n in numbers]


def test_links_that_are_there_are_known_and_the_others_new_in_their_order(tmp_path):
    known = KnownUrls(tmp_path / "known")
    known.add(urls(range(0, 5000, 2)))
    known.add(urls(range(5000, 6000)))
    links = [Link(url) for url in urls(range(5999, -1, -1))]

    found = list(known.new(links))

    assert [link for link, _ in found] == links
    assert [link.url for link, is_new in found if is_new] == urls(range(4999, 0, -2))


def test_nothing_is_known_at_first(tmp_path):
    known = KnownUrls(tmp_path / "known")

    assert [is_new for _, is_new in known.new([Link("https://a.example/")])] == [True]


def test_urls_cannot_be_added_behind_the_first_question(tmp_path):
    known = KnownUrls(tmp_path / "known")
    list(known.new([]))

    with pytest.raises(ValueError, match="cannot be added"):
        known.add(["https://a.example/"])
