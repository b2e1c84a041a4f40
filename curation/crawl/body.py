"""Reading an answer's body with a limit on what it costs, however it is framed or compressed."""

import zlib

from aiohttp import ClientResponse

from curation.errors import LinkError

CHUNK_BYTES = 1 << 16


async def read_body(answer: ClientResponse, max_bytes: int, cut: bool = False) -> bytes:
    """Return the body, decompressed, and never hold more than ``max_bytes`` and a chunk.

    Args:
        answer: Of a session that does not decompress by itself.
        max_bytes: Limit before and after decompression.
        cut: Return the first ``max_bytes`` of a longer body instead of refusing it.

    Raises:
        LinkError: ``too_large``, or ``undecodable`` where the compression is broken.
    """
    promised = answer.content_length
    if promised is not None and promised > max_bytes and not cut:
        raise LinkError("too_large", f"{promised} bytes were announced")
    decoder = _decoder(answer.headers.get("Content-Encoding", ""))
    body = bytearray()
    received = 0
    async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
        received += len(chunk)
        # One byte more than allowed tells a body that is too large from one that just fits.
        body += chunk if decoder is None else decoder.feed(chunk, max_bytes + 1 - len(body))
        if max(len(body), received) > max_bytes:
            if cut:
                return bytes(body[:max_bytes])
            raise LinkError("too_large", f"more than {max_bytes} bytes")
        if decoder is not None and decoder.ended:
            break
    if decoder is not None and not decoder.ended and not cut:
        raise LinkError("truncated", "the compressed body ends too early")
    return bytes(body)


class _Inflate:
    """gzip, zlib and raw deflate, told apart by their first bytes."""

    def __init__(self) -> None:
        self._head = b""
        self._inflate: zlib._Decompress | None = None

    @property
    def ended(self) -> bool:
        return self._inflate is not None and self._inflate.eof

    def feed(self, chunk: bytes, max_bytes: int) -> bytes:
        """Return at most ``max_bytes`` (at least 1) of output; more means the caller refuses the body anyway."""
        if self._inflate is None:
            self._head += chunk
            if len(self._head) < 2:
                return b""
            chunk = self._head
            self._inflate = zlib.decompressobj(_window_bits(chunk))
        try:
            return self._inflate.decompress(chunk, max(1, max_bytes))
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
