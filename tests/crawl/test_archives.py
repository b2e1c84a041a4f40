"""WARC and WAT files, whole and damaged: everything readable is read, and what is not is counted."""

import gzip
import io
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from fastwarc.stream_io import GzipWriter, Lz4Writer, ZstdWriter

from curation import crawl
from curation.config import RunConfig
from curation.config.inputs import InputConfig
from curation.crawl import payload
from curation.crawl.archives import read_records

WARC = Path(os.environ.get("CURATION_TEST_DATA", "../shared/data")).absolute() / "warc"
KINDS = frozenset({"response", "resource", "metadata"})
PAGE = "<img src=/a.jpg><p>text"
HTML = PAGE.encode()

needs_archives = pytest.mark.skipif(not WARC.exists(), reason=f"no archives at {WARC}; set CURATION_TEST_DATA")


def record(kind, url, block, content_type="application/http; msgtype=response", **headers):
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Target-URI: {url}", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(block)}", "", ""]
    return "\r\n".join(lines).encode() + block + b"\r\n\r\n"


def answer(body, *headers, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def page(url, body=HTML, *headers, status="200 OK"):
    return record("response", url, answer(body, "Content-Type: text/html", *headers, status=status))


def read(path, kind="warc", **changes):
    counts = Counter()
    source = InputConfig(kind=kind, path=str(path))
    config = RunConfig.model_validate(changes)
    return list(crawl.read_inputs([source], config, lambda reason: counts.update([reason]))), dict(counts)


def scan(data):
    counts = Counter()
    for found in read_records(io.BytesIO(data), KINDS, 1 << 20, lambda reason: counts.update([reason])):
        counts[found.kind] += 1
    return dict(counts)


def packed(records, writer):
    buffer = io.BytesIO()
    for data in records:
        stream = writer(buffer)
        stream.write(data)
        stream.close()
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["warc", "warc.gz", "warc.zst", "warc.lz4"])
def test_every_packing_gives_the_same_links(tmp_path, suffix):
    records = [page(f"http://site.example/{n}", f"<img src={n}.jpg>".encode()) for n in range(5)]
    writer = {"warc.gz": GzipWriter, "warc.zst": ZstdWriter, "warc.lz4": Lz4Writer}.get(suffix)
    (tmp_path / f"x.{suffix}").write_bytes(b"".join(records) if writer is None else packed(records, writer))

    links, counts = read(tmp_path / f"x.{suffix}")

    assert [link.url for link in links] == [f"http://site.example/{n}.jpg" for n in range(5)]
    assert links[3].page_urls == ("http://site.example/3",)
    assert counts == {}


def test_damage_at_which_fastwarc_panics_is_damage_like_any_other():
    of_other_lines = record("unknown", "http://site.example/1", b"a" * 300).replace(b"\r\n\r\n", b"\n\n", 1)
    with_checksum = b"\x04\x22\x4d\x18\x64\x40\xa7"  # head of an LZ4 frame; the checksum behind it is wrong
    damaged = with_checksum + packed([of_other_lines], Lz4Writer)[len(with_checksum) :] + b"nope"

    found = scan(damaged + packed([page("http://site.example/2")], Lz4Writer))

    assert found == {"record_damaged": 1, "response": 1}


def test_what_is_no_page_is_counted_by_its_reason(tmp_path):
    records = [
        page("http://site.example/gone", status="404 Not Found"),
        page("http://site.example/moved", status="301 Moved"),
        record("response", "http://site.example/x.pdf", answer(b"%PDF", "Content-Type: application/pdf")),
        record("revisit", "http://site.example/same", answer(b"")),
        record("request", "http://site.example/", b"GET / HTTP/1.1\r\n\r\n"),
        page("ftp://site.example/"),
        record("resource", "http://site.example/saved", PAGE.encode(), "text/html"),
        record("response", "http://site.example/untyped", answer(b"<!doctype html>" + PAGE.encode())),
    ]
    (tmp_path / "x.warc").write_bytes(b"".join(records))

    links, counts = read(tmp_path / "x.warc")

    assert [link.page_urls[0] for link in links] == ["http://site.example/saved", "http://site.example/untyped"]
    assert counts == {
        "page_http_404": 1,
        "page_http_301": 1,
        "page_not_html": 1,
        "page_policy_scheme": 1,
        "record_revisit": 1,
    }


def test_the_names_of_record_headers_have_any_capitals_and_a_record_without_a_type_is_damage(tmp_path):
    written = page("http://site.example/")
    small = written.replace(b"WARC-Type: response", b"warc-type: Response")
    of_other_lines = written.replace(b"\r\n", b"\n")
    (tmp_path / "a.warc").write_bytes(small + written)
    (tmp_path / "b.warc").write_bytes(of_other_lines)

    assert len(read(tmp_path / "a.warc")[0]) == 2
    assert read(tmp_path / "b.warc") == ([], {"record_damaged": 1})


def test_damage_costs_the_record_that_it_is_in(tmp_path):
    filler = random.Random(0).randbytes(3000).hex().encode()
    records = [gzip.compress(page(f"http://site.example/{n}", b"<img src=%d.jpg>%b" % (n, filler))) for n in range(5)]
    broken = bytearray(records[2])
    broken[len(broken) // 2] ^= 0xFF
    data = [*records[:2], bytes(broken), b"garbage" * 99, records[3], records[4][:-900]]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(data))

    links, counts = read(tmp_path / "x.warc.gz")

    assert [link.url[-5:] for link in links] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg"]
    assert counts == {"record_damaged": 1, "record_truncated": 1}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (gzip.compress(PAGE.encode()), ["Content-Encoding: gzip"]),
        (gzip.compress(PAGE.encode() * 99)[:-9], ["Content-Encoding: gzip"]),
        (gzip.compress(b" " * 5000) + gzip.compress(PAGE.encode()), ["Content-Encoding: gzip"]),
        (PAGE.encode(), ["Content-Encoding: gzip"]),
        (PAGE.encode(), ["Content-Encoding: br"]),
        (pa.Codec("brotli").compress(PAGE.encode()).to_pybytes(), ["Content-Encoding: br"]),
        (pa.Codec("zstd").compress(PAGE.encode()).to_pybytes(), ["Content-Encoding: zstd"]),
        (f"{len(PAGE):x}\r\n{PAGE}\r\n0\r\n\r\n".encode(), ["Transfer-Encoding: chunked"]),
        (f"{len(PAGE):x}\r\n{PAGE}\r\nnonsense".encode(), ["Transfer-Encoding: chunked"]),
        (PAGE.encode(), ["Transfer-Encoding: chunked", "Content-Length: 99999"]),
        (PAGE.encode(), ["Content-Length: -1"]),
        (PAGE.encode("utf-16"), ["Content-Type: text/html; charset=utf-8"]),
    ],
)
def test_a_body_is_read_whatever_its_headers_say(tmp_path, body, headers):
    (tmp_path / "x.warc").write_bytes(page("http://site.example/", body, *headers))

    links, counts = read(tmp_path / "x.warc")

    assert [link.url for link in links] == ["http://site.example/a.jpg"]
    assert counts.keys() <= {"payload_damaged"}


def test_a_compressed_body_is_unpacked_up_to_the_limit_and_no_further():
    bomb = gzip.compress(bytes(50_000_000))

    assert payload.decode(bomb, "", "gzip", 1_000) == (bytes(1_000), True)


def test_a_page_that_opts_out_in_its_headers_or_itself_marks_its_images(tmp_path):
    records = [
        page("http://site.example/0"),
        page("http://site.example/1", b"<img src=1.jpg>", "X-Robots-Tag: otherbot: noai", "X-Robots-Tag: noimageai"),
        page("http://site.example/2", b"<img src=2.jpg>", "TDM-Reservation: 1"),
        page("http://site.example/3", b"<meta name=Robots content='noindex, noai'><img src=3.jpg>"),
        page("http://site.example/4", b"<meta name=curation content=noml><img src=4.jpg>"),
        page("http://site.example/5", b"<meta name=tdm-reservation content=1><img src=5.jpg>"),
        page("http://site.example/6", b"<meta name=otherbot content=noai><img src=6.jpg>"),
    ]
    (tmp_path / "x.warc").write_bytes(b"".join(records))

    links, _ = read(tmp_path / "x.warc")

    assert [link.opt_out for link in links] == [
        None,
        "opt_out_noimageai",
        "opt_out_tdm",
        "opt_out_noai",
        "opt_out_noml",
        "opt_out_tdm",
        None,
    ]


def wat(url, links, status="200", metas=(), base=None, headers=()):
    head = {"Metas": [{"name": name, "content": content} for name, content in metas]}
    if base is not None:
        head["Base"] = base
    found = {"Head": head, "Links": links}
    response = {"Response-Message": {"Status": status}, "Headers": dict(headers), "HTML-Metadata": found}
    tree = {"Envelope": {"Payload-Metadata": {"HTTP-Response-Metadata": response}}}
    return record("metadata", url, json.dumps(tree).encode(), "application/json")


def test_image_links_of_a_wat_file(tmp_path):
    links = [
        {"path": "IMG@/src", "url": "/a.jpg", "alt": "a"},
        {"path": "IMG@/data-src", "url": "lazy.jpg"},
        {"path": "IMG@/srcset", "url": "s.jpg 1x, l.jpg 2x"},
        {"path": "IMG@/src", "url": "data:image/gif;base64,AA"},
        {"path": "IMG@/longdesc", "url": "/text"},
        {"path": "A@/href", "url": "/page"},
        {"url": 7},
        None,
    ]
    records = [
        wat("http://site.example/dir/page", links, base="/base/"),
        wat("http://site.example/optout", links[:1], metas=[("robots", "noai")]),
        wat("http://site.example/header", links[1:2], headers=[("X-Robots-Tag", ["none", "noml"])]),
        wat("http://site.example/gone", links, status="404"),
        record("metadata", "http://site.example/", b'{"Envelope": HTTP-Response-Metadata', "application/json"),
    ]
    (tmp_path / "x.warc.wat.gz").write_bytes(b"".join(map(gzip.compress, records)))

    found, counts = read(tmp_path / "x.warc.wat.gz", "wat")

    assert [(link.url.removeprefix("http://site.example/"), link.opt_out) for link in found] == [
        ("a.jpg", None),
        ("base/lazy.jpg", None),
        ("base/l.jpg", None),
        ("a.jpg", "opt_out_noai"),
        ("lazy.jpg", "opt_out_noml"),
    ]
    assert counts == {"data_uri": 1, "page_http_404": 1, "record_damaged": 1}


@pytest.mark.parametrize("odd", [b"\\ud83d", b"\xff"])
def test_a_broken_character_costs_a_wat_record_nothing_else(tmp_path, odd):
    links = [{"path": "IMG@/src", "url": "http://ODD.example/"}, {"path": "IMG@/src", "url": "/a.jpg"}]
    data = wat("http://site.example/", links)
    longer = len(odd) - len("ODD")
    length = len(data.partition(b"\r\n\r\n")[2]) - 4
    data = data.replace(b"ODD", odd).replace(b"Length: %d" % length, b"Length: %d" % (length + longer))
    (tmp_path / "x.wat").write_bytes(data)

    found, counts = read(tmp_path / "x.wat", "wat")

    assert [link.url for link in found] == ["http://site.example/a.jpg"]
    assert counts == {"bad_url": 1}


REAL = {
    "example-bad-non-chunked.warc.gz": {"response": 1, "record_revisit": 1},
    "example-bad.warc.gz.bad": {"response": 2, "record_revisit": 1},
    "example-digest.warc": {},
    "example-iana.org-chunked.warc": {"response": 1},
    "example-resource.warc.gz": {"resource": 1},
    "example-space-in-target-uri.warc.gz": {"resource": 1},
    "example-trunc.warc": {"response": 1, "record_damaged": 1},
    "example-wget-bad-target-uri.warc.gz": {"response": 1, "resource": 2, "metadata": 1},
    "example-wrong-chunks.warc.gz": {"response": 1},
    "example.warc": {"response": 1, "record_revisit": 1},
    "example.warc.gz": {"response": 1, "record_revisit": 1},
    "post-test.warc.gz": {"response": 3},
    "pywb-dupes.warc.gz": {"response": 3, "record_revisit": 9},
    "pywb-example-wget-1-14.warc.gz": {"response": 1, "resource": 3},
    "pywb-iana.warc.gz": {"response": 48, "record_revisit": 123},
    "resiliparse-block-sized-records.warc": {},
    "resiliparse-block-sized-records.warc.gz": {},
    "resiliparse-block-sized-records.warc.lz4": {},
    "resiliparse-clipped.warc.gz": {"response": 1, "record_truncated": 1},
    "resiliparse-clueweb-quirk.warc.gz": {"response": 29},
    "resiliparse-warcfile.warc": {"response": 16, "metadata": 16},
    "resiliparse-warcfile.warc.gz": {"response": 16, "metadata": 16},
    "resiliparse-warcfile.warc.lz4": {"response": 16, "metadata": 16},
    "whirlwind.warc.gz": {"response": 1, "metadata": 1},
    "whirlwind.warc.wat.gz": {"metadata": 1},
}


@pytest.mark.shared_data
@needs_archives
def test_every_real_archive_is_read_to_its_end_or_to_its_damage():
    assert {file.name: scan(file.read_bytes()) for file in WARC.iterdir()} == REAL


@pytest.mark.shared_data
@needs_archives
def test_links_of_real_archives_do_not_depend_on_how_they_are_packed():
    names = ("resiliparse-warcfile.warc", "resiliparse-warcfile.warc.gz", "resiliparse-warcfile.warc.lz4")
    plain, *others = (read(WARC / name) for name in names)

    assert len(plain[0]) > 100
    assert all(other == plain for other in others)


@pytest.mark.shared_data
@needs_archives
def test_mutated_archives_are_read_without_an_error():
    drawn = random.Random(0)
    names = ("pywb-iana.warc.gz", "resiliparse-warcfile.warc", "resiliparse-warcfile.warc.lz4", "example.warc.gz")
    for data in [(WARC / name).read_bytes()[:200_000] for name in names]:
        whole = sum(scan(data).values())
        for _ in range(40):
            mutated = bytearray(data)
            place = drawn.randrange(len(data))
            match drawn.randrange(3):
                case 0:
                    mutated[place] ^= 1 << drawn.randrange(8)
                case 1:
                    del mutated[place:]
                case _:
                    mutated[place : place + drawn.randrange(1, 3000)] = drawn.randbytes(drawn.randrange(3000))
            counts = scan(bytes(mutated))
            assert sum(counts.values()) <= whole + 30
