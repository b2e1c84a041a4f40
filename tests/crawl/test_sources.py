"""Remote input files, from a real server that breaks off, stalls, refuses ranges and changes its mind."""

import gzip
import hashlib
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import crawl
from curation.config import RunConfig
from curation.config.fetch import CrawlConfig
from curation.config.inputs import InputConfig
from curation.crawl.sources import RemoteFile, open_source
from curation.errors import InputError

DATA = random.Random(0).randbytes(3_000_000)


class Server:
    """Serves ``files``; ``break_after`` bytes of an answer the connection ends.

    Attributes:
        url: Where.
        requests: Path → ``Range`` headers seen.
    """

    def __init__(self):
        self.files = {}
        self.break_after = None
        self.ranges = True
        self.failures = Counter()  # path → answers with 503 that are left
        self.versions = {}
        self.requests = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, request):
        path, wanted = request.path, request.headers.get("Range")
        self.requests.setdefault(path, []).append(wanted)
        data = self.files.get(path)
        if data is None or self.failures[path] > 0:
            self.failures[path] -= 1
            request.send_response(404 if data is None else 503)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(wanted[6:-1]) if wanted and self.ranges else 0
        if start >= len(data) > 0:
            request.send_response(416)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("ETag", self.versions.get(path, "1"))
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        stop = len(data) if self.break_after is None else min(len(data), start + self.break_after)
        request.wfile.write(data[start:stop])
        if stop < len(data):
            request.close_connection = True
            request.connection.close()


@pytest.fixture
def server():
    found = Server()
    yield found
    found.close()


def config(**changes):
    return CrawlConfig(**{"input_backoff_s": 0.001, "input_timeout_s": 5.0, "input_attempts": 3, **changes})


def read(server, source, **crawl_settings):
    counts = Counter()
    settings = RunConfig(crawl=config(**crawl_settings))
    return list(crawl.read_inputs([source], settings, lambda reason: counts.update([reason]))), counts


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(server, ranges):
    server.files["/x"], server.break_after, server.ranges = DATA, 1_000_000 if ranges else 2_999_999, ranges
    if not ranges:
        server.break_after = None
        server.failures["/x"] = 2

    with open_source(f"{server.url}/x", config(), "test") as stream:
        assert hashlib.sha256(stream.read()).digest() == hashlib.sha256(DATA).digest()

    wanted = ["bytes=1000000-", "bytes=2000000-"] if ranges else [None, None]
    assert server.requests["/x"][1:] == wanted


def test_a_file_that_gives_no_further_byte_is_given_up(server):
    server.files["/x"], server.break_after = DATA, 0

    with open_source(f"{server.url}/x", config(), "test") as stream, pytest.raises(OSError, match="bytes are missing"):
        stream.read()

    assert len(server.requests["/x"]) == 3


def test_what_is_not_there_is_not_asked_for_again(server):
    with pytest.raises(OSError, match="404"):
        RemoteFile(f"{server.url}/x", config(), "test")

    assert len(server.requests["/x"]) == 1


def test_a_file_that_changes_while_it_is_read_is_noticed(server):
    server.files["/x"], server.break_after = DATA, 2_000_000

    with open_source(f"{server.url}/x", config(), "test") as stream:
        stream.read(1000)
        server.versions["/x"] = "2"
        with pytest.raises(InputError, match="has changed"):
            stream.read()


def test_a_file_larger_than_allowed_is_refused(server):
    server.files["/x"] = DATA

    stream = open_source(f"{server.url}/x", config(max_download_bytes=100_000), "test")
    with stream, pytest.raises(OSError, match="max_download_bytes"):
        stream.read()


def test_lists_are_read_over_http_whatever_their_format(server):
    urls = [f"http://site.example/{number}.jpg" for number in range(5000)]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"url": urls}), buffer)
    server.files["/x.parquet"] = buffer.getvalue().to_pybytes()
    server.files["/x.txt"] = "\n".join(urls).encode()
    server.files["/x.csv.gz"] = gzip.compress(("url\n" + "\n".join(urls)).encode())
    server.break_after = 20_000

    for name in server.files:
        links, counts = read(server, InputConfig(kind="urls", path=server.url + name))

        assert [link.url for link in links] == urls
        assert not counts


def warc(*pages):
    found = b""
    for url, html in pages:
        block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html.encode()
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
        head += f"Content-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
        found += gzip.compress(head.encode() + block + b"\r\n\r\n")
    return found


def test_a_listing_is_read_from_its_mirror_and_lost_files_are_counted(server, tmp_path):
    paths = [f"crawl-data/CC-MAIN/{number}.warc.gz" for number in range(4)]
    for number in (0, 1, 3):
        pages = [(f"http://site{number}.example/{page}", f"<img src={page}.jpg>") for page in range(50)]
        server.files[f"/{paths[number]}"] = warc(*pages)
    server.files["/warc.paths.gz"] = gzip.compress("\n".join(paths).encode())
    server.break_after = 3_000
    source = InputConfig(kind="warc", path=f"{server.url}/warc.paths.gz", mirror=server.url)

    links, counts = read(server, source)

    assert [link.url for link in links] == [
        f"http://site{number}.example/{page}.jpg" for number in (0, 1, 3) for page in range(50)
    ]
    assert counts == {"file_unreadable": 1}
    for path, data in server.files.items():
        (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path[1:]).write_bytes(data)
    local = InputConfig(kind="warc", path=str(tmp_path / "warc.paths.gz"), mirror=str(tmp_path))
    assert read(server, local) == (links, counts)


def test_an_input_that_is_all_there_is_and_cannot_be_read_stops_the_crawl(server):
    with pytest.raises(InputError, match="404"):
        read(server, InputConfig(kind="warc", path=f"{server.url}/x.warc.gz"))


def test_a_list_that_is_all_there_is_may_be_damaged_but_must_come_to_its_end(server):
    lines = b"".join(b"http://site.example/%d.jpg\n" % number for number in range(80_000))
    server.files = {"/x.txt.gz": gzip.compress(lines)[:-50_000], "/x.txt": lines}

    links, counts = read(server, InputConfig(kind="urls", path=f"{server.url}/x.txt.gz"))

    assert len(links) > 20_000
    assert counts == {"file_unreadable": 1}
    with pytest.raises(InputError, match="more than"):
        read(server, InputConfig(kind="urls", path=f"{server.url}/x.txt"), max_download_bytes=1_500_000)
