from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import crawl
from curation.config.inputs import InputConfig
from curation.errors import InputError


def read(config, *inputs):
    counts = Counter()
    links = list(crawl.read_inputs(inputs, config, lambda reason: counts.update([reason])))
    return links, counts


def test_live_pages_give_their_images_in_the_order_of_the_list(site, settings):
    site.pages = {f"/page/{number}": f"<img src=/image/{number}><img src=x.svg>" for number in range(30)}
    site.robots = "User-agent: *\nDisallow: /page/7\n"
    pages = [f"{site.url}/page/{number}" for number in range(30)]

    links, counts = read(settings(), InputConfig(kind="pages", urls=(*pages, site.url + "/status/500", "nonsense")))

    assert [link.url for link in links] == [f"{site.url}/image/{number}" for number in range(30) if number != 7]
    assert links[0].page_urls == (pages[0],)
    assert counts == {"svg": 29, "page_robots": 1, "page_http_500": 1, "bad_url": 1}


def test_a_page_list_may_be_a_file_and_pages_may_move(site, settings, tmp_path):
    site.pages = {"/new/place": "<img src=x.jpg>"}
    (tmp_path / "pages.txt").write_text(
        f"\ufeff{site.url}/to?url=/new/place\n\n  {site.url}/image/1  \n{site.url}/short"
    )

    links, counts = read(settings(), InputConfig(kind="pages", path=str(tmp_path / "pages.txt")))

    assert [(link.url, link.page_urls) for link in links] == [(f"{site.url}/new/x.jpg", (f"{site.url}/new/place",))]
    assert counts == {"page_not_html": 2}


def test_a_long_page_is_read_up_to_the_limit(site, settings):
    site.pages = {"/page": "<img src=a.jpg>" + " " * 2000 + "<img src=b.jpg>"}
    config = settings()
    config = config.model_copy(update={"crawl": config.crawl.model_copy(update={"max_page_bytes": 1000})})

    links, counts = read(config, InputConfig(kind="pages", urls=(site.url + "/page",)))

    assert [link.url for link in links] == [f"{site.url}/a.jpg"]
    assert not counts


def test_saved_pages_start_from_the_base_url(settings, tmp_path):
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "a.html").write_text("<img src=x.jpg>")
    (tmp_path / "sub dir" / "b.HTM").write_text("<img src=y.jpg><img src=/z.jpg>")
    (tmp_path / "c.txt").write_text("<img src=no.jpg>")

    folder, _ = read(settings(), InputConfig(kind="html", path=str(tmp_path), base_url="https://example.com/blog/"))
    single, _ = read(
        settings(), InputConfig(kind="html", path=str(tmp_path / "a.html"), base_url="https://example.com/p/page")
    )

    assert [(link.url, *link.page_urls) for link in folder] == [
        ("https://example.com/blog/x.jpg", "https://example.com/blog/a.html"),
        ("https://example.com/blog/sub%20dir/y.jpg", "https://example.com/blog/sub%20dir/b.HTM"),
        ("https://example.com/z.jpg", "https://example.com/blog/sub%20dir/b.HTM"),
    ]
    assert [(link.url, *link.page_urls) for link in single] == [
        ("https://example.com/p/x.jpg", "https://example.com/p/page")
    ]


def test_saved_pages_without_a_base_give_absolute_links(settings, tmp_path):
    (tmp_path / "a.html").write_text("<img src=x.jpg><img src=http://example.com/y.jpg>")
    (tmp_path / "b.html").write_bytes(b"<div>" * 20_000)

    links, counts = read(settings(), InputConfig(kind="html", path=str(tmp_path)))

    assert [(link.url, *link.page_urls) for link in links] == [
        ("http://example.com/y.jpg", f"file://{tmp_path}/a.html")
    ]
    assert counts == {"bad_url": 1, "page_bad_page": 1}


def test_url_lists_of_every_format_give_the_same_links(settings, tmp_path):
    urls = ["HTTP://EXAMPLE.com/a,b", "http://example.com/ä", "nonsense", "http://example.com/c"]
    (tmp_path / "x.txt").write_text("\r\n".join(urls))
    (tmp_path / "x.csv").write_text(
        'id,url\n1,"HTTP://EXAMPLE.com/a,b"\n2,http://example.com/ä\n3\n4,nonsense\n5,' + urls[3]
    )
    (tmp_path / "x.tsv").write_text("url\tid\n" + "\n".join(f"{url}\t1" for url in urls))
    pq.write_table(pa.table({"url": [*urls[:2], None, *urls[2:]]}), tmp_path / "x.parquet")
    expected = ["http://example.com/a,b", "http://example.com/%C3%A4", "http://example.com/c"]

    for name in ("x.txt", "x.csv", "x.tsv", "x.parquet"):
        links, counts = read(settings(), InputConfig(kind="urls", path=str(tmp_path / name)))

        assert [link.url for link in links] == expected
        assert counts["bad_url"] == 1
    inline, _ = read(settings(), InputConfig(kind="urls", urls=tuple(urls)))
    assert [link.url for link in inline] == expected


def test_inputs_come_in_the_order_of_the_settings_and_files_sorted(settings, tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"http://example.com/{name}")
    first = InputConfig(kind="urls", urls=("http://example.com/z",))

    links, _ = read(settings(), first, InputConfig(kind="urls", path=str(tmp_path / "*.txt")))

    assert [link.url.rpartition("/")[2] for link in links] == ["z", "a.txt", "b.txt"]


def test_a_list_without_its_column_says_what_there_is(settings, tmp_path):
    (tmp_path / "x.csv").write_text("id,link\n1,http://example.com/\n")

    with pytest.raises(InputError, match=r"x\.csv: no column url; set url_column to one of: id, link"):
        read(settings(), InputConfig(kind="urls", path=str(tmp_path / "x.csv")))


def test_damaged_lists_are_counted(settings, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"http://example.com/a\n" + b"x" * 200_000 + b"\n\xff\xfe\0\nhttp://example.com/b")
    (tmp_path / "y.csv").write_bytes(b"url\nhttp://example.com/a\n" + b'"' + b"x\n" * 200_000)

    text, text_counts = read(settings(), InputConfig(kind="urls", path=str(tmp_path / "x.txt")))
    _, csv_counts = read(settings(), InputConfig(kind="urls", path=str(tmp_path / "y.csv")))

    assert [link.url for link in text] == ["http://example.com/a", "http://example.com/b"]
    assert text_counts == {"damaged_row": 1, "bad_url": 1}
    assert sum(csv_counts.values()) == 200_000
