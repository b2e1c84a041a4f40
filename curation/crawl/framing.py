"""An answer may not cost more framing than body: interim answers, heads, sizes and extensions of chunks, trailers.

Each piece of framing is small for whoever sends it and costs this side a Python object or more: a server that sends
interim answers (1xx) without end, or a body in chunks of one byte, would keep the event loop from all other servers.
"""

from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from curation.errors import LinkError

MAX_FRAMING_BYTES = 1 << 16  # beside as many as the body has
MAX_ANSWERS = 32  # to one request: all but the last are interim
# Parsed at a time, and eight times what the body has had: framing without a body is met in small steps, so that little
# is parsed in vain, and bodies come in few large pieces: each costs 10 us, and their memory goes back to the system.
_STEP_BYTES, _STEP_GROWTH = 1 << 12, 8


class FramedConnector(aiohttp.TCPConnector):
    """A connector that ends an answer which is mostly framing; its request raises LinkError, ``too_large``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory: Any = lambda: _Handler(loop=self._loop)


class _Handler(ResponseHandler):
    _received_bytes = 0
    _num_answers = 0
    _payload_before: Any = None  # of an earlier answer over the same connection

    def set_response_params(self, **options: Any) -> None:
        """Begin with the answer to another request."""
        self._received_bytes = self._num_answers = 0
        self._payload_before = self._payload
        super().set_response_params(**options)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Take the head of an answer."""
        self._num_answers += 1
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """Take what arrived; empty where reading goes on."""
        start = self._step(data, 0)
        while start < len(data) and self.is_connected():
            start = self._step(data, start)

    def _step(self, data: bytes, start: int) -> int:
        """Parse some of ``data`` from ``start`` on, and return where it goes on."""
        end = start + _STEP_BYTES + _STEP_GROWTH * self._body_bytes()
        self._take(data[start:end])
        return end

    def _body_bytes(self) -> int:
        payload = self._payload
        return 0 if payload is None or payload is self._payload_before else payload.total_bytes

    def _take(self, data: bytes) -> None:
        self._received_bytes += len(data)
        super().data_received(data)
        if self._received_bytes > MAX_FRAMING_BYTES + 2 * self._body_bytes() or self._num_answers > MAX_ANSWERS:
            refusal = LinkError(
                "too_large", f"more than {MAX_FRAMING_BYTES} bytes of framing, or {MAX_ANSWERS} answers"
            )
            if self._payload is not None:
                self._payload.set_exception(refusal)
            self.set_exception(refusal)
            if self.transport is not None:
                self.transport.abort()
