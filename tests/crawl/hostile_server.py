"""A server that misbehaves in a dozen ways, on real sockets; run as a program it prints its port and serves.

``GET /<kind>/<number>.jpg``: ``good`` answers with an image, the others as ``KINDS`` says.
"""

import asyncio
import gzip
import io
import struct
import sys
import zlib

import numpy as np
from PIL import Image

# What each kind ends as.
KINDS = {
    "drip": "timeout",  # a byte now and then
    "mute": "timeout",  # takes the request and never says a word
    "endless": "too_large",
    "more": "timeout",  # announces more than it sends, and leaves the connection open
    "less": "truncated",  # announces less than it sends: the rest is no HTTP
    "bomb": "too_large",
    "loop": "too_many_redirects",
    "private": "policy_address",  # a redirect to where only this machine can go
    "busy": "http_429",
    "html": "not_an_image",
    "huge": "too_many_pixels",
    "tls": "connect",  # asked with https, it answers with a piece of a handshake
}


def photo(seed: int, side_px: int = 320) -> bytes:
    """Return a JPEG of about 20 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px // 8, side_px // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def huge_png(side_px: int = 50_000) -> bytes:
    """Return a small PNG that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


PHOTOS = [photo(seed) for seed in range(8)]
HUGE = huge_png()
BOMB = gzip.compress(bytes(200_000_000))


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    return head(status, Content_Length=len(body), **headers) + body


async def answer(kind: str, number: int, writer: asyncio.StreamWriter) -> bool:
    """Answer a request; return whether the connection goes on."""
    image = PHOTOS[number % len(PHOTOS)]
    if kind == "good":
        writer.write(whole(image, Content_Type="image/jpeg"))
    elif kind == "drip":
        writer.write(head(Content_Type="image/jpeg"))
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)
    elif kind == "mute":
        await asyncio.sleep(3600)
    elif kind == "endless":
        writer.write(head(Content_Type="image/jpeg"))
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
    elif kind == "more":
        writer.write(head(Content_Length=len(image) + 1000) + image)
        await writer.drain()
        await asyncio.sleep(3600)
    elif kind == "less":
        writer.write(head(Content_Length=len(image) // 2) + image)
        return False
    elif kind == "bomb":
        writer.write(whole(BOMB, Content_Encoding="gzip"))
    elif kind == "loop":
        writer.write(whole(b"", "302 Found", Location=f"/loop/{number}.jpg"))
    elif kind == "private":
        writer.write(whole(b"", "302 Found", Location="http://169.254.169.254/latest/meta-data/"))
    elif kind == "busy":
        writer.write(whole(b"", "429 Too Many Requests", Retry_After=1))
    elif kind == "html":
        writer.write(whole(b"<html><p>no such picture</p></html>", Content_Type="image/jpeg"))
    elif kind == "huge":
        writer.write(whole(HUGE, Content_Type="image/png"))
    else:
        writer.write(whole(b"", "404 Not Found"))
    await writer.drain()
    return True


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        if await reader.readexactly(1) == b"\x16":  # a TLS handshake: begin an answer, and hang up
            writer.write(b"\x16\x03\x03\x00\x7a\x02\x00\x00")
            await writer.drain()
            return
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            _, kind, name = (request.split(b" ")[1].decode() + "/").split("/")[:3]
            if not await answer(kind, int(name.partition(".")[0] or 0) if name[:1].isdigit() else 0, writer):
                return
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return  # the client had enough
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until whoever started it goes


if __name__ == "__main__":
    asyncio.run(main())
