import hashlib
import json
import os
import pty
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from curation.cli import main

PAYLOAD = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if "missing" in self.path:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAYLOAD)))
        self.end_headers()
        return self.wfile.write(PAYLOAD)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("CURATION_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CURATION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("arguments", [["models"], ["models", "list"]])
def test_the_list_says_what_for_under_which_licence_and_where(arguments, capsys, cache):
    assert main(arguments) == 0

    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "installed" in lines["opennsfw"]
    assert "BSD-2-Clause" in lines["opennsfw"]
    assert "not pinned" in lines["sscd_disc_mixup"]
    assert "--trust-first-download" in lines["sscd_disc_mixup"]
    assert "not fetched" in lines["retinaface-resnet34"]
    assert not cache.exists()  # listing downloads nothing


def test_the_list_as_json_cites(capsys):
    assert main(["models", "list", "--json"]) == 0

    rows = json.loads(capsys.readouterr().out)
    assert all(row["citation"] and row["license"] and row["state"] for row in rows)


def test_a_url_with_its_digest_is_fetched_with_json_lines(server, capsys, cache):
    assert main(["models", "fetch", f"{server}/my.onnx#sha256={SHA256}"]) == 0

    said = capsys.readouterr()
    assert said.out.split() == ["my", SHA256, str(cache / f"my-{SHA256[:16]}.onnx")]
    lines = [json.loads(line) for line in said.err.splitlines()]
    assert lines[-1]["event"] == "download"
    assert lines[-1]["bytes"] == lines[-1]["of"] == len(PAYLOAD)


def test_a_wrong_digest_a_missing_file_and_no_digest_fail_in_one_line(server, capsys, cache):
    assert main(["models", "fetch", f"{server}/my.onnx#sha256={'0' * 64}"]) == 1
    assert "what came was removed" in capsys.readouterr().err
    assert main(["models", "fetch", f"{server}/missing.onnx?sig=hunter2#sha256={SHA256}"]) == 1
    failed = capsys.readouterr().err
    assert "HTTP 404" in failed
    assert "hunter2" not in failed
    assert main(["models", "fetch", f"{server}/my.onnx"]) == 1
    assert "add #sha256=" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_a_name_without_a_digest_needs_a_decision(capsys, monkeypatch):
    assert main(["models", "fetch", "sscd_disc_mixup"]) == 1
    assert "--trust-first-download" in capsys.readouterr().err

    monkeypatch.setenv("CURATION_OFFLINE", "1")
    assert main(["models", "fetch", "sscd_disc_mixup", "--trust-first-download"]) == 1
    assert "CURATION_OFFLINE=1 forbids" in capsys.readouterr().err


def test_fetching_all_takes_what_is_pinned_and_names_what_is_left_out(capsys, monkeypatch):
    monkeypatch.setenv("CURATION_OFFLINE", "1")

    assert main(["models", "fetch", "all"]) == 1  # one is pinned, and is not here
    said = capsys.readouterr()
    assert "opennsfw" in said.out
    assert "weights retinaface-resnet34: not in" in said.err
    assert "weights sscd_disc_mixup skipped" in said.err
    assert main(["models", "fetch", "all", "--trust-first-download"]) == 2


def test_verify_looks_at_what_is_here_and_fails_on_what_is_wrong(capsys, tmp_path):
    assert main(["models", "verify"]) == 0
    assert "ok   opennsfw" in capsys.readouterr().out

    path = tmp_path / "mine.onnx"
    path.write_bytes(b"no model")
    assert main(["models", "verify", "opennsfw", str(path)]) == 1
    out = capsys.readouterr().out
    assert "ok   opennsfw" in out
    assert f"BAD  {path}" in out
    assert main(["models", "verify", "nothing-of-this-name"]) == 1


def test_a_terminal_shows_a_bar(server, cache):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "curation.cli", "models", "fetch", f"{server}/my.onnx#sha256={SHA256}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, env=os.environ | {"TERM": "xterm"})
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)

    assert process.wait(timeout=60) == 0
    assert b"my" in shown
    assert b"512.0/512.0 kB" in shown
    assert b"{" not in shown


def test_listing_imports_no_deep_learning_library():
    script = "import sys; from curation.cli import main; main(['models']); print(sorted(sys.modules))"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert not {"'torch'", "'timm'", "'onnxruntime'"} & set(done.stdout.replace("[", "").replace("]", "").split(", "))
    assert time.monotonic() - started < 30
