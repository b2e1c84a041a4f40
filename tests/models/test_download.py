import contextlib
import hashlib
import os
import re
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from curation.errors import WeightsError
from curation.models.download import Source, cached_path, download
from curation.models.transport import Limits, check_url, redacted, redacted_text

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
QUICK = Limits(
    idle_s=1.0, answer_s=0.5, stall_s=0.5, stall_bytes=4096, max_bytes=4 << 20, max_redirects=3, attempts=2, backoff_s=0
)


@dataclass
class Server:
    """What was asked, and how to answer: the path says it, as in ``/cut/no-ranges/model.onnx``."""

    url: str
    body: bytes = PAYLOAD
    etag: str = '"v1"'
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)  # statuses of the next answers


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_GET(self):
        state = self.server_state
        state.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        words = set(self.path.partition("?")[0].split("/"))
        if state.faults:
            return self.send_error(state.faults.pop(0))
        if "missing" in words:
            return self.send_error(404)
        if "redirect" in words:
            return self._redirect(self.path.partition("/to=")[2])
        if "loop" in words:
            return self._redirect(self.path)
        if "drip-headers" in words:
            return self._drip(b"X-Header: never complete, byte by byte")
        return self._file(state, words)

    def _file(self, state, words):
        asked, start = self.headers.get("Range"), 0
        if asked and "no-ranges" not in words and self.headers.get("If-Range") in (None, state.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(state.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(state.body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = state.body[start:]
        self.send_response(206 if start else 200)
        if start:
            shift = 1 if "wrong-place" in words else 0
            self.send_header("Content-Range", f"bytes {start - shift}-{len(state.body) - 1}/{len(state.body)}")
        if "no-length" not in words:
            self.send_header("Content-Length", "9" * 18 if "huge" in words else str(len(body)))
        if "gzip" in words:
            self.send_header("Content-Encoding", "gzip")
        if state.etag:
            self.send_header("ETag", state.etag)
        self.end_headers()
        if "drip" in words:
            return self._drip(body)
        self.wfile.write(body[: len(body) // 2] if "cut" in words and not start else body)

    def _drip(self, body):
        for at in range(min(len(body), 200)):
            try:
                self.wfile.write(body[at : at + 1])
            except OSError:
                return
            time.sleep(0.02)

    def _redirect(self, where):
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {})) as running:
        state = Server(f"http://127.0.0.1:{running.server_port}")
        running.RequestHandlerClass.server_state = state
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for name in ("CURATION_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def get(url, folder, limits=QUICK, progress=None, **changes):
    source = replace(Source("model", url, SHA256, len(PAYLOAD)), **changes)
    return download(source, folder, limits=limits, progress=progress)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def leave_part(folder, content, etag="", sha256=SHA256):
    part = folder / f"model-{sha256[:16]}.part"
    part.write_bytes(content)
    if etag:
        part.with_suffix(".etag").write_text(etag)


def test_a_file_arrives_under_its_digest_and_nothing_else_stays(server, tmp_path):
    seen = []
    done = get(f"{server.url}/model.onnx", tmp_path, progress=lambda *report: seen.append(report))

    assert done.path.read_bytes() == PAYLOAD
    assert (done.sha256, done.num_bytes) == (SHA256, len(PAYLOAD))
    assert names(tmp_path) == [f"model-{SHA256[:16]}.onnx"]
    assert seen[-1] == ("model", len(PAYLOAD), len(PAYLOAD))
    assert [report[1] for report in seen] == sorted(report[1] for report in seen)


def test_a_file_that_is_there_is_not_asked_for_again(server, tmp_path):
    get(f"{server.url}/model.onnx", tmp_path)
    get(f"{server.url}/model.onnx", tmp_path)

    assert len(server.asked) == 1


def test_a_truncated_answer_goes_on_in_the_same_call(server, tmp_path):
    assert get(f"{server.url}/cut/model.onnx", tmp_path).path.read_bytes() == PAYLOAD
    assert [asked[1:] for asked in server.asked] == [(None, None), (f"bytes={len(PAYLOAD) // 2}-", '"v1"')]


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    leave_part(tmp_path, PAYLOAD[:1000], '"v1"')

    assert get(f"{server.url}/model.onnx", tmp_path).path.read_bytes() == PAYLOAD
    assert [asked[1] for asked in server.asked] == ["bytes=1000-"]


def test_a_file_that_changed_meanwhile_is_read_from_its_start(server, tmp_path):
    leave_part(tmp_path, b"old" * 300, '"v0"')

    assert get(f"{server.url}/model.onnx", tmp_path).path.read_bytes() == PAYLOAD
    assert len(server.asked) == 1  # If-Range: the server itself sends everything


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    leave_part(tmp_path, PAYLOAD[:1000], '"v1"')

    assert get(f"{server.url}/no-ranges/model.onnx", tmp_path).path.read_bytes() == PAYLOAD


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(server, tmp_path):
    with pytest.raises(WeightsError, match="connection ended after"):
        get(f"{server.url}/cut/no-ranges/model.onnx", tmp_path)

    assert len(server.asked) == 3  # the first brings half, then two bring nothing new


def test_a_range_that_is_not_the_one_asked_for_is_thrown_away(server, tmp_path):
    leave_part(tmp_path, PAYLOAD[:1000], '"v1"')

    assert get(f"{server.url}/wrong-place/model.onnx", tmp_path).path.read_bytes() == PAYLOAD
    assert [asked[1] for asked in server.asked] == ["bytes=1000-", None]


@pytest.mark.parametrize("num_bytes", [0, len(PAYLOAD)])
def test_a_part_that_is_complete_needs_no_more_bytes(num_bytes, server, tmp_path):
    leave_part(tmp_path, PAYLOAD)

    assert get(f"{server.url}/model.onnx", tmp_path, num_bytes=num_bytes).path.read_bytes() == PAYLOAD
    assert len(server.asked) == (0 if num_bytes else 1)  # without a size the server says 416: nothing is left


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    leave_part(tmp_path, PAYLOAD + b"tail")

    assert get(f"{server.url}/model.onnx", tmp_path, num_bytes=0).path.read_bytes() == PAYLOAD


def test_bytes_that_differ_from_the_digest_are_refused_and_removed(server, tmp_path):
    server.body = PAYLOAD[:-1] + b"\0"

    with pytest.raises(WeightsError, match=f"{SHA256}.*what came was removed"):
        get(f"{server.url}/model.onnx", tmp_path)
    assert names(tmp_path) == []


def test_a_part_that_was_tampered_with_is_found_out_and_removed(server, tmp_path):
    leave_part(tmp_path, b"\xff" * 1000, '"v1"')

    with pytest.raises(WeightsError, match="what came was removed"):
        get(f"{server.url}/model.onnx", tmp_path)
    assert get(f"{server.url}/model.onnx", tmp_path).path.read_bytes() == PAYLOAD


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("model.onnx", {"num_bytes": 1000}, "has 1048576 bytes, not 1000"),
        ("huge/model.onnx", {"num_bytes": 0}, "bytes, not at most 4194304"),
        ("no-length/model.onnx", {"num_bytes": 1000}, "sends more than 1000"),
        ("no-length/model.onnx", {"sha256": "", "num_bytes": 0}, "does not say how long it is"),
        ("missing/model.onnx", {}, "HTTP 404"),
        ("gzip/model.onnx", {}, "not the plain file"),
        ("loop/model.onnx", {}, "redirects more than 3 times"),
    ],
)
def test_a_wrong_answer_is_refused_at_once(path, changes, message, server, tmp_path):
    with pytest.raises(WeightsError, match=message):
        get(f"{server.url}/{path}", tmp_path, **changes)

    assert names(tmp_path) == []
    assert len(server.asked) <= 4


def test_a_size_cap_holds_where_no_length_is_said(server, tmp_path):
    with pytest.raises(WeightsError, match="sends more than 100000"):
        get(f"{server.url}/no-length/m.onnx", tmp_path, limits=replace(QUICK, max_bytes=100_000), num_bytes=0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_passes_is_tried_again(status, server, tmp_path):
    server.faults = [status]

    assert get(f"{server.url}/model.onnx", tmp_path).path.read_bytes() == PAYLOAD
    server.faults = [status] * 5
    with pytest.raises(WeightsError, match=f"HTTP {status}"):
        get(f"{server.url}/other.pt", tmp_path)


@pytest.mark.parametrize("path", ["drip", "drip-headers"])
def test_a_server_that_drips_is_given_up(path, server, tmp_path):
    started = time.monotonic()
    with pytest.raises(WeightsError, match="failed"):
        get(f"{server.url}/{path}/model.onnx", tmp_path)

    assert time.monotonic() - started < 4


def test_a_server_that_says_nothing_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(WeightsError, match="failed"):
            get(f"http://127.0.0.1:{silent.getsockname()[1]}/model.onnx", tmp_path)

    assert time.monotonic() - started < 4


def test_a_server_that_speaks_no_http_is_a_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            for _ in range(2):
                connection, _ = other.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(4096)
                    connection.sendall(b"\x1b[31mSSH-2.0-anything\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(WeightsError, match="no valid HTTP answer") as caught:
            get(f"http://127.0.0.1:{other.getsockname()[1]}/model.onnx", tmp_path)
        thread.join()

    assert "\x1b" not in str(caught.value)


def test_a_redirect_is_followed_and_resumed(server, tmp_path):
    leave_part(tmp_path, PAYLOAD[:1000], '"v1"')

    assert get(f"{server.url}/redirect/to=/model.onnx?token=abc", tmp_path).path.read_bytes() == PAYLOAD
    assert [asked[1] for asked in server.asked] == ["bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://example.org/x", "http://[x/"])
def test_a_redirect_to_where_nothing_is_downloaded_from_is_refused(target, server, tmp_path):
    with pytest.raises(WeightsError, match=r"only https|no URL"):
        get(f"{server.url}/redirect/to={target}", tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/m.onnx",
        "file:///etc/passwd",
        "ftp://example.org/m.onnx",
        "https://user:hunter2@example.org/m.onnx",
        "https://example.org/m\r\nHost: x",
        "https:///m.onnx",
        "https://example.org:99999/m.onnx",
        "not a url",
    ],
)
def test_other_urls_than_https_are_refused_before_anything_is_sent(url, tmp_path):
    with pytest.raises(WeightsError) as caught:
        get(url, tmp_path / "cache")

    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_redirect_from_elsewhere_to_this_machine_is_refused():
    check_url("http://127.0.0.1/x", redirected_from="http://localhost/y")
    with pytest.raises(WeightsError, match="on this machine"):
        check_url("https://127.0.0.1/x", redirected_from="https://example.org/y")


def test_messages_never_hold_what_may_be_secret(server, tmp_path):
    for path in ("missing/model.onnx", "cut/no-ranges/model.onnx", "loop/model.onnx"):
        with pytest.raises(WeightsError) as caught:
            get(f"{server.url}/{path}?X-Amz-Signature=hunter2", tmp_path)
        assert "hunter2" not in str(caught.value)
        assert path in str(caught.value)
    assert redacted("https://me:hunter2@example.org:8443/a?k=hunter2#hunter2") == "https://example.org:8443/a?…"
    assert redacted_text("GET https://x/y?sig=hunter2&z failed\nmore") == "GET https://x/y?… failed"


@pytest.mark.parametrize("variable", ["CURATION_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_is_a_clear_error_and_asks_nobody(variable, server, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(WeightsError, match=f"{variable}=1 forbids.*path of a file"):
        get(f"{server.url}/model.onnx", tmp_path)

    assert server.asked == []
    monkeypatch.setenv(variable, "0")
    assert get(f"{server.url}/model.onnx", tmp_path).num_bytes == len(PAYLOAD)


def test_https_goes_through_the_environments_proxy_and_this_machine_does_not(server, tmp_path, monkeypatch):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def refuse():
            for _ in range(2):
                connection, _ = proxy.accept()
                with connection, contextlib.suppress(OSError):
                    asked.append(connection.recv(4096).split(b"\r\n")[0])
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(WeightsError, match="403"):
            get("https://models.invalid/m.onnx", tmp_path)
        thread.join()
        assert get(f"{server.url}/model.onnx", tmp_path).num_bytes == len(PAYLOAD)

    assert [re.sub(rb" HTTP/1.\d", b"", line) for line in asked] == [b"CONNECT models.invalid:443"] * 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run([*command, "-keyout", str(path) + ".key", "-out", str(path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no certificate can be made here: {error}")
    return path


def test_an_untrusted_certificate_is_refused_and_a_named_one_trusted(server, certificate, tmp_path, monkeypatch):
    handler = type("Handler", (_Handler,), {"server_state": server})
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, str(certificate) + ".key")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.handle_error = lambda *args: None  # the refused handshake
        running.socket = tls.wrap_socket(running.socket, server_side=True)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        url = f"https://localhost:{running.server_port}/model.onnx"
        try:
            with pytest.raises(WeightsError, match="certificate is not trusted"):
                get(url, tmp_path)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert get(url, tmp_path).path.read_bytes() == PAYLOAD
        finally:
            running.shutdown()
            thread.join()


def test_a_full_or_forbidden_cache_is_a_clear_error(server, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")

    with pytest.raises(WeightsError, match="failed"):
        get(f"{server.url}/model.onnx", blocked / "cache")
    assert server.asked == []


def test_processes_that_want_the_same_file_share_one_download(server, tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from curation.models.download import Source, download
        url, sha256, folder = sys.argv[1:]
        print(download(Source("model", url, sha256), Path(folder)).path)
        """
    )
    command = [sys.executable, "-c", script, f"{server.url}/model.onnx", SHA256, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(3)]
    found = [process.communicate(timeout=60)[0].strip() for process in running]

    assert [process.returncode for process in running] == [0, 0, 0]
    assert set(found) == {str(cached_path(Source("model", server.url + "/model.onnx", SHA256), tmp_path))}
    assert names(tmp_path) == [f"model-{SHA256[:16]}.onnx"]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "suffix"),
    [("m.onnx", ".onnx"), ("m.torchscript.pt", ".pt"), ("m.pth.tar?x=1", ".pth"), ("m.sh", ""), ("m", "")],
)
def test_only_suffixes_that_loaders_know_are_kept(url, suffix, tmp_path):
    path = cached_path(Source("model", f"https://example.org/{url}", SHA256), tmp_path)

    assert path.name == f"model-{SHA256[:16]}{suffix}"
