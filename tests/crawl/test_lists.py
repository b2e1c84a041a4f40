"""What lists of URLs say besides the URL, and which column is the URL's."""

import bz2
import gzip
import json
from collections import Counter
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import crawl
from curation.config import RunConfig
from curation.config.inputs import InputConfig
from curation.crawl import inputs
from curation.errors import InputError

URLS = ["http://site.example/0.jpg", "http://site.example/1.jpg", "http://site.example/2.jpg"]


def read(path, **source):
    counts = Counter()
    listed = [InputConfig(kind="urls", path=str(path), **source)]
    return list(crawl.read_inputs(listed, RunConfig(), lambda reason: counts.update([reason]))), dict(counts)


@pytest.mark.parametrize("name", ["url", "URL", "image_url", "OriginalURL"])
def test_the_column_of_the_url_is_found_by_its_name(tmp_path, name):
    pq.write_table(pa.table({"id": [1, 2, 3], "page_url": ["x"] * 3, name: URLS}), tmp_path / "x.parquet")

    links, _ = read(tmp_path / "x.parquet")

    assert [link.url for link in links] == URLS


def test_further_columns_come_along_as_json_with_sorted_keys(tmp_path):
    captions = ['a "quoted"\\ back\nslash\tü', None, "bell\a"]
    table = pa.table(
        {
            "URL": pa.array(URLS).dictionary_encode().dictionary_decode(),
            "TEXT": captions,
            "WIDTH": pa.array([640, None, -1], pa.int32()),
            "similarity": pa.array([0.25, None, float("nan")], pa.float32()),
            "safe": [True, None, False],
            "tags": [["a", "b"], None, []],
            "day": pa.array([date(2026, 1, 2), None, None]),
            "kind": pa.array(["x", None, "y"]).dictionary_encode(),
            "bytes": pa.array([b"\x00", None, None]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")

    links, _ = read(tmp_path / "x.parquet")
    some, _ = read(tmp_path / "x.parquet", columns=("WIDTH", "TEXT"))
    none, _ = read(tmp_path / "x.parquet", columns=())

    assert json.loads(links[0].extra) == {
        "TEXT": captions[0],
        "WIDTH": 640,
        "day": "2026-01-02",
        "kind": "x",
        "safe": True,
        "similarity": 0.25,
        "tags": ["a", "b"],
    }
    assert list(json.loads(links[0].extra)) == sorted(json.loads(links[0].extra))
    assert links[1].extra is None
    assert json.loads(links[2].extra) == {"TEXT": "bell\a", "WIDTH": -1, "kind": "y", "safe": False, "tags": []}
    assert json.loads(some[0].extra) == {"TEXT": captions[0], "WIDTH": 640}
    assert {link.extra for link in none} == {None}


def test_every_format_says_the_same_of_its_rows(tmp_path):
    rows = [("url", "caption"), (URLS[0], 'x, "y"'), ("nonsense", "dropped"), (URLS[1], ""), (URLS[2], "ü")]
    quoted = "\n".join(f'{url},"{caption.replace(chr(34), chr(34) * 2)}"' for url, caption in rows)
    (tmp_path / "x.csv").write_text(quoted)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(quoted.encode()))
    (tmp_path / "x.tsv").write_text("\n".join(f'{url}\t"{text.replace(chr(34), chr(34) * 2)}"' for url, text in rows))
    table = pa.table({"url": [url for url, _ in rows[1:]], "caption": [text or None for _, text in rows[1:]]})
    pq.write_table(table, tmp_path / "x.parquet")

    found = [read(tmp_path / f"x.{suffix}") for suffix in ("csv", "csv.gz", "tsv", "parquet")]

    assert all(one == found[0] for one in found)
    assert [(link.url, link.extra) for link in found[0][0]] == [
        (URLS[0], '{"caption":"x, \\"y\\""}'),
        (URLS[1], None),
        (URLS[2], '{"caption":"ü"}'),
    ]
    assert found[0][1] == {"bad_url": 1}


def test_a_list_without_a_header_has_numbered_columns(tmp_path):
    (tmp_path / "cc12m.tsv").write_text("\n".join(f"{url}\tcaption {n}" for n, url in enumerate(URLS)))

    links, _ = read(tmp_path / "cc12m.tsv")

    assert [(link.url, link.extra) for link in links] == [
        (url, f'{{"1":"caption {number}"}}') for number, url in enumerate(URLS)
    ]


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    (tmp_path / "x.csv").write_text(f"url,caption\n{URLS[0]},x")

    with pytest.raises(InputError, match="no column text; set columns to some of: url, caption"):
        read(tmp_path / "x.csv", columns=("text",))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.csv", "\r\nURL;TEXT\r\n{0};a, b\r\n{1};c\r\n"),
        ("x.csv", "TEXT\tURL\na, b\t{0}\nc\t{1}"),
        ("x.csv", "a, b|{0}\nc|{1}"),
        ("x.tsv", "URL\tTEXT\r\n{0}\ta, b\r\n{1}\tü"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_delimiter_of_a_csv_file_is_told_by_its_first_line(tmp_path, name, data, encoding):
    (tmp_path / name).write_text(data.format(*URLS), encoding, newline="")

    links, counts = read(tmp_path / name)

    assert [(link.url, "a, b" in link.extra) for link in links] == [(URLS[0], True), (URLS[1], False)]
    assert counts == {}


def test_what_follows_a_tab_in_a_text_list_does_not_become_part_of_the_url(tmp_path):
    (tmp_path / "x.txt").write_text(f"{URLS[0]}\t640\t480\n\t{URLS[1]}\n")

    links, _ = read(tmp_path / "x.txt")

    assert [link.url for link in links] == URLS[:2]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_quote_that_is_left_open_swallows_no_rows(tmp_path, name):
    cell = "\t" if name == "x.tsv" else ","
    lines = [
        f"url{cell}TEXT",
        f'{URLS[0]}{cell}"a',
        f"{URLS[1]}{cell}b",
        f'"{URLS[2]}{cell}c',
        f'{URLS[2]}{cell}"d\ne"',
    ]
    (tmp_path / name).write_text("\n".join(lines))

    links, counts = read(tmp_path / name)

    assert [(link.url, json.loads(link.extra)["TEXT"]) for link in links] == [
        *((URLS[0], "a"), (URLS[1], "b"), (URLS[2], "d\ne"))
    ]
    assert counts == {"damaged_row": 1}


def test_a_first_line_that_leaves_a_quote_open_is_an_error(tmp_path):
    (tmp_path / "x.csv").write_text(f'url,"TEXT\n{URLS[0]},a\n')

    with pytest.raises(InputError, match="quote"):
        read(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("suffix", "pack"), [("bz2", bz2.compress), ("lz4", lambda data: pa.Codec("lz4").compress(data).to_pybytes())]
)
def test_a_packed_csv_file_is_one_whatever_packs_it(tmp_path, suffix, pack):
    (tmp_path / f"x.csv.{suffix}").write_bytes(pack(f"url,TEXT\n{URLS[0]},a".encode()))

    assert [(link.url, link.extra) for link in read(tmp_path / f"x.csv.{suffix}")[0]] == [(URLS[0], '{"TEXT":"a"}')]


def test_an_empty_csv_file_among_others_stops_nothing(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "b.csv").write_text(f"url\n{URLS[0]}")

    assert [link.url for link in read(tmp_path / "*.csv")[0]] == URLS[:1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_a_url_column_of_any_type_of_text_is_read(tmp_path, kind):
    pq.write_table(pa.table({"URL": pa.array(URLS).cast(kind), "TEXT": URLS}), tmp_path / "x.parquet")

    assert [link.url for link in read(tmp_path / "x.parquet")[0]] == URLS


def test_text_that_is_no_utf8_and_a_column_without_values_cost_nothing_else(tmp_path):
    not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([URLS[0].encode(), b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"url": not_utf8, "TEXT": not_utf8}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": pa.nulls(2)}), tmp_path / "b.parquet")

    links, counts = read(tmp_path / "*.parquet")

    assert [(link.url, link.extra) for link in links] == [(URLS[0], f'{{"TEXT":"{URLS[0]}"}}')]
    assert counts == {"bad_url": 1}


def test_a_packed_list_that_is_all_there_is_may_be_cut_short(tmp_path):
    urls = [f"http://site.example/{number * 7919 % 100_000}.jpg" for number in range(10_000)]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("\n".join(urls).encode())[:-4_000])

    links, counts = read(tmp_path / "x.txt.gz")

    assert len(links) > 5_000
    assert counts == {"file_unreadable": 1}


def test_a_packed_list_that_is_cut_short_gives_what_is_whole(tmp_path):
    urls = [f"http://site.example/{number * 7919 % 100_000}.jpg" for number in range(50_000)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(urls).encode())[:-20_000])
    (tmp_path / "b.txt").write_text(URLS[0])

    links, counts = read(tmp_path / "*.txt*")

    assert [link.url for link in links[:-1]] == urls[: len(links) - 1]
    assert len(links) > 10_000
    assert links[-1].url == URLS[0]
    assert counts == {"file_unreadable": 1}


def test_a_large_parquet_list_is_read_in_parts_that_hold_each_row_once(tmp_path, monkeypatch):
    urls = [f"http://site.example/{number}.jpg" for number in range(1000)]
    pq.write_table(pa.table({"url": urls}), tmp_path / "x.parquet", row_group_size=70)
    whole = read(tmp_path / "x.parquet")
    monkeypatch.setattr(inputs, "_LIST_ROWS_A_PART", 200)

    parts = inputs.split([InputConfig(kind="urls", path=str(tmp_path / "x.parquet"))], RunConfig())

    assert [part.row_groups for part in parts] == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)]
    assert read(tmp_path / "x.parquet") == whole
    assert [link.url for link in whole[0]] == urls
