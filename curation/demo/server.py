"""Serves the demo's website on loopback: a real HTTP server, so that crawling is real."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from curation.errors import InputError

_HOST = "127.0.0.1"
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
}


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve ``folder/www`` for the length of a ``with`` block.

    The port is kept in ``folder/port`` and taken again the next time: URLs are part of a run's data, and at another
    port all of them would be new.

    Args:
        folder: Of ``build_site``.
        port: 0: the kept one, else any that is free.

    Yields:
        The base URL, without a slash at its end.

    Raises:
        InputError: There is no website, or the port is taken.
    """
    root = folder / "www"
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; build the demo's website first")
    kept = folder / "port"
    wanted = port or _kept_port(kept)
    try:
        server = _Server((_HOST, wanted), partial(_Handler, directory=str(root.resolve())))
    except OSError as error:
        raise InputError(
            f"port {wanted} of the demo's website cannot be had ({error.strerror}): stop what uses it, or delete "
            f"{kept} to take another port, whose URLs are new to the run"
        ) from error
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="demo-site", daemon=True
    )
    thread.start()
    try:
        kept.write_text(f"{server.server_port}\n", encoding="ascii")
        yield f"http://{_HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _kept_port(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return 0
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise InputError(f"{path}: not a port number; delete the file")
    return int(text)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without the look-up of the host's full name, which hangs where there is no DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, int(self.server_address[1])


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder, no listings, nothing outside the folder."""

    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds an idle connection keeps its thread

    def send_head(self) -> Any:
        root = Path(self.directory)
        wanted = unquote(urlsplit(self.path).path)
        if "\0" in wanted or not Path(self.translate_path(self.path)).resolve().is_relative_to(root):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def guess_type(self, path: Any) -> str:
        """Return the type from our own table; the operating system's differs by machine."""
        return _CONTENT_TYPES.get(Path(path).suffix.lower(), "application/octet-stream")

    def list_directory(self, path: Any) -> BytesIO | None:
        self.send_error(HTTPStatus.NOT_FOUND)
        return None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing: the run's progress is on the terminal."""
