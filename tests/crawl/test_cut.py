"""Links become shards: every URL once, hosts kept together, sets kept in order."""

import random
from collections import Counter, defaultdict

import pytest

from curation import schema
from curation.config import RunConfig
from curation.crawl.cut import cut
from curation.crawl.links import Link, to_table
from curation.crawl.merge import with_hashes
from curation.settings import parse


def config(rows, host_spread=4):
    return parse(RunConfig, {"shards": {"rows": rows}, "crawl": {"host_spread": host_spread}}, "test.yaml")


def web(number=500, hosts=20):
    return [Link(f"https://host{n % hosts}.example/{n}.jpg", (f"https://page{n % 7}.example/",)) for n in range(number)]


def local(number=100):
    return [
        Link(f"file:///set/{n:04d}.jpg", source_kind="file", source_path=f"/set/{n:04d}.jpg", source_bytes=n)
        for n in range(number)
    ]


def tables(links, batch=97):
    """Yield links as ``cut`` takes them, a few at a time."""
    links, position = list(links), 0
    for start in range(0, len(links), batch):
        table, position = with_hashes(to_table(links[start : start + batch]), position)
        yield table


def shards(links, settings, scratch):
    return [table.column("url").to_pylist() for table in cut(tables(links), settings, scratch)]


def host(url):
    return url.split("/")[2]


def test_every_unique_url_is_in_exactly_one_row(tmp_path):
    links = web() + local() + web(200) + local(30)

    found = Counter(url for urls in shards(links, config(50), tmp_path) for url in urls)

    assert found == Counter(link.url for link in web() + local())


def test_pages_of_a_url_that_comes_again_are_merged_and_sorted(tmp_path):
    links = [
        Link("https://h.example/a.jpg", ("https://z.example/",)),
        Link("https://h.example/a.jpg", ("https://b.example/",)),
    ]

    (table,) = cut(tables([*links, links[0]]), config(10), tmp_path)

    assert table.to_pylist()[0]["page_urls"] == ["https://b.example/", "https://z.example/"]
    assert table.schema == schema.CRAWL.schema


@pytest.mark.parametrize(("number", "rows", "expected"), [(1, 10, 1), (10, 10, 1), (11, 10, 2), (100, 10, 10)])
def test_there_are_as_many_shards_as_the_rows_ask_for(tmp_path, number, rows, expected):
    assert len(shards(local(number), config(rows), tmp_path / "local")) == expected
    assert len(shards(web(number), config(rows), tmp_path / "web")) == expected
    assert len(shards(web(number) + local(number), config(rows), tmp_path / "both")) == 2 * expected


def test_more_shards_than_open_files_lose_nothing(tmp_path):
    links = web(600, hosts=600) + local(600)

    found = shards(links, config(2), tmp_path)

    assert len(found) == 600
    assert sorted(url for urls in found for url in urls) == sorted(link.url for link in links)


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_one_host_is_in_at_most_host_spread_shards(tmp_path, spread):
    where = defaultdict(set)
    for shard, urls in enumerate(shards(web(2000, hosts=3), config(20, spread), tmp_path)):
        for url in urls:
            where[host(url)].add(shard)

    assert {len(found) for found in where.values()} == {spread}


def test_local_sets_stay_in_order_and_shards_are_even(tmp_path):
    found = shards(local(95), config(10), tmp_path)

    assert [url for urls in found for url in urls] == [link.url for link in local(95)]
    assert max(map(len, found)) <= 10


def test_local_sets_are_cut_evenly_behind_many_web_links(tmp_path):
    found = shards(web(900) + local(100), config(10), tmp_path)

    assert [len(urls) for urls in found[90:]] == [10] * 10
    assert all(url.startswith("file:") for urls in found[90:] for url in urls)


def test_the_order_of_web_links_does_not_matter(tmp_path):
    drawn = random.Random(0)
    shuffled = drawn.sample(web(), 500)
    for place, link in zip(sorted(drawn.sample(range(500), 100)), local(), strict=True):
        shuffled.insert(place, link)

    assert shards(web() + local(), config(50), tmp_path / "a") == shards(shuffled, config(50), tmp_path / "b")


def test_no_links_make_one_empty_shard(tmp_path):
    (table,) = cut([], config(10), tmp_path)

    assert table.num_rows == 0
    assert table.schema == schema.CRAWL.schema


def test_urls_that_are_no_unicode_text_are_no_reason_to_fail(tmp_path):
    assert shards([Link("https://h.example/ü\u202e.jpg"), *local(1)], config(1), tmp_path)


@pytest.mark.parametrize(("spread", "rows", "shared"), [(1, 20, 1), (4, 20, 4), (4, 3, 7), (4, 9000, 1)])
def test_each_row_says_how_many_shards_share_its_host(tmp_path, spread, rows, shared):
    links = [*web(2000, hosts=1), *(Link(f"https://small{n}.example/") for n in range(20)), *local(5)]

    found = [row for table in cut(tables(links), config(rows, spread), tmp_path) for row in table.to_pylist()]

    counts = {row["host_shards"] for row in found if "host0" in row["url"]}
    assert counts == {shared}  # 7: a shard holds no more than 100 times its rows of one host
    assert {row["host_shards"] for row in found if "small" in row["url"]} == {1}
    assert {row["host_shards"] for row in found if row["source_kind"] == "file"} == {None}
