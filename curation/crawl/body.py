"""Reading an answer's body with a limit on what it costs, however it is framed or compressed."""

import asyncio
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from aiohttp import ClientResponse

from curation.errors import LinkError

LARGE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Body:
    """A body that was read.

    Attributes:
        data: Decompressed.
        received_bytes: As they came over the wire.
        is_large: It holds a place among the large ones, which whoever is done with it releases.
    """

    data: bytes
    received_bytes: int
    is_large: bool


async def read_body(answer: ClientResponse, max_bytes: int, large: asyncio.Semaphore, cut: bool = False) -> Body:
    """Return the body, decompressed, and never hold more than ``max_bytes`` and a chunk.

    Args:
        answer: Of a session that does not decompress by itself.
        max_bytes: Limit before and after decompression.
        large: Places of bodies above ``LARGE_BYTES``; one that grows beyond waits for a place.
        cut: Return the first ``max_bytes`` of a longer body instead of refusing it.

    Raises:
        LinkError: ``too_large``, ``truncated``, or ``undecodable`` where the compression is broken.
    """
    promised = answer.content_length
    if promised is not None and promised > max_bytes and not cut:
        raise LinkError("too_large", f"{promised} bytes were announced")
    decoder = _decoder(answer.headers.get("Content-Encoding", ""))
    parts: list[bytes] = []
    size = received = 0
    is_large = False
    try:
        async for chunk in answer.content.iter_any():
            received += len(chunk)
            for part in (chunk,) if decoder is None else decoder.feed(chunk):
                parts.append(part)
                size += len(part)
                if size > LARGE_BYTES and not is_large:
                    await large.acquire()
                    is_large = True
                if max(size, received) > max_bytes:
                    if cut:
                        return Body(b"".join(parts)[:max_bytes], received, is_large)
                    raise LinkError("too_large", f"more than {max_bytes} bytes")
                if decoder is not None:
                    await asyncio.sleep(0)  # others have their turn before a bomb goes on
            if decoder is not None and decoder.ended:
                break
        if decoder is not None and not decoder.ended and not cut:
            raise LinkError("truncated", "the compressed body ends too early")
        return Body(b"".join(parts), received, is_large)
    except BaseException:
        if is_large:
            large.release()
        parts.clear()  # the error refers to this frame, and is referred to by frames that it went through: until the
        raise  # garbage collector comes, it would keep the body


class _Inflate:
    """gzip, zlib and raw deflate, told apart by their first bytes."""

    def __init__(self) -> None:
        self._head = b""
        self._inflate: zlib._Decompress | None = None

    @property
    def ended(self) -> bool:
        return self._inflate is not None and self._inflate.eof

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the output in parts of limited size."""
        if self._inflate is None:
            self._head += chunk
            if len(self._head) < 2:
                return
            chunk = self._head
            self._inflate = zlib.decompressobj(_window_bits(chunk))
        try:
            while chunk and not self._inflate.eof:
                yield self._inflate.decompress(chunk, _CHUNK_BYTES)
                chunk = self._inflate.unconsumed_tail
        except zlib.error as error:
            raise LinkError("undecodable", f"broken compression: {error}") from error


def _window_bits(head: bytes) -> int:
    if head[:2] == b"\x1f\x8b":
        return 16 + zlib.MAX_WBITS
    is_zlib = head[0] & 0x0F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS


def _decoder(encoding: str) -> _Inflate | None:
    names = [name.strip().lower() for name in encoding.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if not names:
        return None
    if len(names) == 1 and names[0] in ("gzip", "x-gzip", "deflate"):
        return _Inflate()
    raise LinkError("undecodable", f"content encoding {encoding[:40]!r} was not asked for")
