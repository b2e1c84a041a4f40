"""A crawl that was killed goes on with the shards that were not finished, and no server sees the others again."""

import io
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml
from PIL import Image

from curation.store import Run

_NUM_URLS = 90


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hits[self.path] += 1
            body = photo(int(self.path[2:-4])) if self.path.startswith("/i") else b""
            time.sleep(0.05 if body else 0)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(ConnectionError):  # the client was killed
                super().handle()

    hits = Counter()
    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.daemon_threads = True
    thread = threading.Thread(target=site.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{site.server_port}", hits
    site.shutdown()
    thread.join()
    site.server_close()


def test_after_kill_9_only_unfinished_shards_are_requested_again(server, tmp_path):
    url, hits = server
    inputs = [{"kind": "urls", "urls": [f"{url}/i{number}.png" for number in range(_NUM_URLS)]}]
    fetch = {"allow_private_addresses": True, "concurrency": 2}
    settings = {"pool": {"inputs": inputs}, "fetch": fetch, "shards": {"rows": 15}, "crawl": {"host_spread": 6}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "curation.cli", "run", "--config", str(tmp_path / "run.yaml")]
    command += ["--run", str(tmp_path / "run"), "--stage", "fetch", "--workers", "1"]
    run = Run(tmp_path / "run")

    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(run.markers("pool", "fetch")) < 2:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    time.sleep(0.5)  # the worker dies with it; what it had asked for arrives
    finished = list(run.markers("pool", "fetch"))
    before = Counter(hits)

    subprocess.run(command, check=True, capture_output=True)

    shards = {shard: run.read_table("pool", "crawl", shard).column("url").to_pylist() for shard in range(6)}
    assert sum(map(len, shards.values())) == _NUM_URLS
    assert 2 <= len(finished) < 6
    for shard, urls in shards.items():
        again = [hits[path] - before[path] for path in (link.removeprefix(url) for link in urls)]
        assert again == [0 if shard in finished else 1] * len(urls)
        rows = run.read_table("pool", "fetch", shard, ["reject_reason", "image_id"])
        assert rows.column("reject_reason").null_count == len(urls) == rows.num_rows
