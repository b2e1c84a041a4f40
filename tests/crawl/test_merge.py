"""Rows of one URL become one, whatever is merged with what, and memory stays bounded."""

import random

import pyarrow as pa
import pytest

from curation.crawl.bulk import hash_all, normalise_all
from curation.crawl.links import Link, from_table, to_table
from curation.crawl.merge import merge, unique, with_hashes
from curation.crawl.urls import normalise
from curation.errors import LinkError


def table(links, position=0):
    return with_hashes(to_table(links), position)[0]


def drawn_links(number, seed=0):
    drawn = random.Random(seed)
    return [
        Link(
            f"https://h{drawn.randrange(9)}.example/{drawn.randrange(number // 4)}",
            tuple(sorted({f"https://p.example/{drawn.randrange(6)}" for _ in range(drawn.randrange(3))})),
            opt_out=drawn.choice([None, None, "opt_out_noai", "opt_out_tdm"]),
            extra=drawn.choice([None, '{"a":1}', '{"a":2}']),
        )
        for _ in range(number)
    ]


def expected(links):
    found = {}
    for link in links:
        old = found.get(link.url, Link(link.url))
        found[link.url] = Link(
            link.url,
            tuple(sorted({*old.page_urls, *link.page_urls})),
            opt_out=min(filter(None, (old.opt_out, link.opt_out)), default=None),
            extra=min(filter(None, (old.extra, link.extra)), default=None),
        )
    return found


def links_of(rows):
    return {link.url: link for link in from_table(rows)}


def test_a_merge_keeps_all_pages_and_the_smallest_of_what_is_said():
    links = drawn_links(2000)

    assert links_of(merge(table(links), 100)) == expected(links)


@pytest.mark.parametrize("held_bytes", [20_000, 10_000_000])
def test_unique_rows_are_the_same_however_little_is_held(tmp_path, held_bytes):
    links = drawn_links(3000)
    pieces = [table(links[start : start + 50]) for start in range(0, len(links), 50)]

    rows = pa.concat_tables(list(unique(pieces, tmp_path, 100, held_bytes)))

    assert rows.num_rows == len(expected(links))
    assert links_of(rows) == expected(links)


def test_urls_with_one_hash_stay_apart():
    links = drawn_links(300)
    rows = table(links)
    place = rows.schema.get_field_index("url_hash")
    rows = rows.set_column(place, rows.schema.field(place), pa.array([7] * len(links), pa.uint64()))

    assert links_of(merge(rows, 100)) == expected(links)


def test_a_link_keeps_the_first_pages_where_too_many_show_it(tmp_path):
    pages = [f"https://p.example/{number:05d}" for number in range(5000)]
    random.Random(0).shuffle(pages)
    pieces = (
        table([Link("https://h.example/logo.png", (page,)) for page in pages[n : n + 100]]) for n in range(0, 5000, 100)
    )

    (rows,) = unique(pieces, tmp_path, max_pages=10, held_bytes=20_000)

    assert rows.column("page_urls")[0].as_py() == sorted(pages)[:10]


def test_a_local_copy_wins_over_the_web_and_the_first_one_over_others():
    links = [
        Link("https://h.example/a"),
        Link("https://h.example/a", source_kind="tar", source_path="/1.tar", source_offset=1),
        Link("https://h.example/a", source_kind="tar", source_path="/0.tar", source_offset=0),
    ]

    (row,) = from_table(merge(table(links), 10))

    assert (row.source_kind, row.source_path) == ("tar", "/1.tar")


def test_what_is_found_normal_at_a_glance_is_normal():
    drawn = random.Random(0)
    characters = "abz019-_.~!$&'()*+,;=:@%2eE/?#\"<>\\^`{|}[] AZ\u00e9\t"
    texts = [
        drawn.choice(["http://", "https://", "http:/", "HTTP://"])
        + "".join(drawn.choice("abz019-_.xn") for _ in range(drawn.randrange(1, 12)))
        + drawn.choice(["/", ":80/", "", "/../", "/.", "/a/./b"])
        + "".join(drawn.choice(characters) for _ in range(drawn.randrange(8)))
        for _ in range(20_000)
    ]

    def normalised(text):
        try:
            return normalise(text)
        except LinkError:
            return None

    expected = [normalised(text) for text in texts]
    assert normalise_all(pa.array(texts), lambda reason: None).to_pylist() == expected
    assert normalise_all(pa.array(texts[:99]), lambda reason: None).to_pylist() == expected[:99]  # few: no glance


def test_hashes_never_change():
    texts = pa.array(["", "https://a.example/", None, "https://b.example/"]).slice(1)

    assert hash_all(texts).tolist() == [10004088387706569020, 17280346270528514342, 8940412396046908454]
