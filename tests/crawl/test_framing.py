"""Answers that are mostly framing, and heads that are no text, of a server on a real socket."""

import asyncio

import pytest

from curation import crawl
from curation.crawl.links import Link

_HEAD = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Floods:
    """A server that sends ``head``, then ``rest`` until the client hangs up; well-known files are missing."""

    def __init__(self, head, rest):
        self.head, self.rest = head, rest
        self.connections = []

    async def serve(self, reader, writer):
        self.connections.append(asyncio.current_task())
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                if b".jpg" not in request:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                writer.write(self.head)
                while self.rest:
                    writer.write(self.rest * 1000)
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


@pytest.fixture
def fetch(settings):
    """Fetch one image of a server, and return the result."""

    async def run(server):
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
            link = Link(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/a.jpg")
            (found,) = await asyncio.to_thread(lambda: list(crawl.fetch([link], settings(max_bytes=50_000_000))))
        await asyncio.gather(*server.connections)
        return found

    return lambda server: asyncio.run(run(server))


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"),
        (_CHUNKED, b"1\r\nx\r\n"),
        (_CHUNKED, b"1;" + b"e" * 100 + b"\r\nx\r\n"),
        (_CHUNKED + b"5;", b"e"),
    ],
)
def test_an_answer_of_framing_without_end_is_refused_long_before_its_deadline(fetch, head, rest):
    server = Floods(head, rest)

    found = fetch(server)

    assert found.reject_reason == "too_large"
    assert found.fetch_ms < 2500  # of 5000


def test_chunks_of_a_few_bytes_are_a_body_like_any_other(fetch, make_image):
    image = make_image(1, 400, quality=95)
    chunks = [image[start : start + 16] for start in range(0, len(image), 16)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)

    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3

    assert fetch(Floods(interim + _CHUNKED + body + b"0\r\n\r\n", b"")).data == image


def test_heads_that_are_no_text_are_stored_as_text(fetch, make_image):
    image = make_image(1)
    tags = b'ETag: "\xff\xfe"\r\nLast-Modified: \xe9\r\n'

    found = fetch(Floods(_HEAD + tags + b"Content-Length: %d\r\n\r\n" % len(image) + image, b""))
    refused = fetch(Floods(b"HTTP/1.1 410 \xff\xfe\r\nContent-Length: 0\r\n\r\n", b""))

    assert (found.etag, found.last_modified) == ('"\ufffd\ufffd"', "\ufffd")
    assert (refused.reject_reason, refused.detail) == ("http_410", "\ufffd\ufffd")
