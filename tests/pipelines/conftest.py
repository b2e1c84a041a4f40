"""Sixty real images with planted copies and broken files, a seed set, a reference set, and a finished run of them."""

import io
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curation.config import RunConfig
from curation.pipelines.context import Context
from curation.pipelines.driver import Event, Request, bring_up
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.publish import publish
from curation.settings import parse
from curation.store import Run

SIDE_PX = 96


def _photos() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    crops = []
    for source in sources:
        image = Image.fromarray(source)
        for top in range(0, image.height - SIDE_PX + 1, SIDE_PX):
            for left in range(0, image.width - SIDE_PX + 1, SIDE_PX):
                crop = image.crop((left, top, left + SIDE_PX, top + SIDE_PX))
                spread = sum(high - low for low, high in crop.getextrema())
                if spread > 480:  # enough to see
                    crops.append(crop)
    return crops


def _jpeg(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pool`` (60 files), ``seeds`` (6) and ``references`` (2)."""
    folder = tmp_path_factory.mktemp("images")
    photos = _photos()
    for name in ("pool", "seeds", "references"):
        (folder / name).mkdir()
    pool = photos[:44]
    for index, photo in enumerate(pool):
        (folder / "pool" / f"{index:03d}.jpg").write_bytes(_jpeg(photo))
    for index in range(8):
        (folder / "pool" / f"copy{index}.jpg").write_bytes(_jpeg(pool[index], 50))
    for index in range(2):
        (folder / "pool" / f"same{index}.jpg").write_bytes(_jpeg(pool[10 + index]))
    for index in range(2):
        (folder / "pool" / f"reference{index}.jpg").write_bytes(_jpeg(photos[50 + index], 60))
        (folder / "references" / f"{index}.jpg").write_bytes(_jpeg(photos[50 + index]))
    (folder / "pool" / "html.jpg").write_bytes(b"<html>not an image</html>")
    (folder / "pool" / "short.jpg").write_bytes(_jpeg(pool[0])[:700])
    (folder / "pool" / "empty.jpg").write_bytes(b"")
    (folder / "pool" / "tiny.png").write_bytes(_png(pool[0].resize((4, 4))))
    for index in range(6):
        (folder / "seeds" / f"{index}.jpg").write_bytes(_jpeg(photos[54 + index]))
    assert len(list((folder / "pool").iterdir())) == 60
    return folder


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _tree(images: Path, rows: int = 100) -> dict[str, Any]:
    """Settings of a run of the images, as plain values."""
    return {
        "pool": {"inputs": [{"kind": "folder", "path": str(images / "pool")}]},
        "seeds": {"some": {"inputs": [{"kind": "folder", "path": str(images / "seeds")}], "k": 2}},
        "references": {"test": {"inputs": [{"kind": "folder", "path": str(images / "references")}]}},
        "shards": {"rows": rows},
        "cluster": {"num_clusters": 4, "iterations": 5},
        "faces": {"scales": [1.0]},
    }


def _bring(url: str | Path, tree: dict[str, Any], request: Request | None = None, runner: Any = None) -> list[Event]:
    """Bring a run up; return its events."""
    config = parse(RunConfig, tree, "test.yaml")
    context, plan = Context(Run(url), config), build_plan(config)
    events: list[Event] = []
    bring_up(context, plan, request or Request(), runner or LocalRunner(2), events.append)
    publish(context)
    return events


def _digest(url: str | Path) -> str:
    """The digest of a run's manifest."""
    return str(json.loads(Run(url).read_bytes("manifest.json"))["digest"])


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one shard; tests must not change it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    _bring(run, _tree(images))
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def tree(images: Path) -> Callable[..., dict[str, Any]]:
    """``tree(rows=100)``: settings of a run of the images."""
    return lambda rows=100: _tree(images, rows)


@pytest.fixture(scope="session")
def bring() -> Callable[..., list[Event]]:
    """``bring(url, tree, request=None, runner=None)`` brings a run up and returns its events."""
    return _bring


@pytest.fixture(scope="session")
def digest() -> Callable[[str | Path], str]:
    """``digest(url)`` is that of a run's manifest."""
    return _digest


@pytest.fixture(scope="session")
def ray_runner() -> Iterator[Any]:
    """A runner on one small local cluster for the whole session."""
    from curation.pipelines.ray_runner import RayRunner

    runner = RayRunner(object_store_bytes=80_000_000)
    yield runner
    runner.close()


class FlakySite:
    """A web server on loopback whose images may fail for a while.

    Attributes:
        url: ``http://127.0.0.1:port``.
        images: Path → bytes; any other path is a 404.
        failing: Path → status that is answered instead.
        hits: Requests for each path, robots.txt and the like left out.
        delay_s: Before each answer.
    """

    def __init__(self) -> None:
        self.images: dict[str, bytes] = {}
        self.failing: dict[str, int] = {}
        self.hits: Counter[str] = Counter()
        self.delay_s = 0.0
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body, status = site.images.get(self.path), site.failing.get(self.path, 200)
                if body is not None:
                    site.hits[self.path] += 1
                    time.sleep(site.delay_s)
                if body is None or status != 200:
                    body, status = b"", status if body is not None else 404
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{self.path}"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, folder: Path) -> list[str]:
        """Serve the images of a folder; return their paths."""
        found = {f"/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
        self.images |= found
        return list(found)

    def tree(self, paths: list[str], rows: int = 100) -> dict[str, Any]:
        """Settings of a run of some paths."""
        return {
            "pool": {"inputs": [{"kind": "urls", "urls": [self.url + path for path in paths]}]},
            "fetch": {"allow_private_addresses": True, "retries": 0, "user_agent": "test/1.0"},
            "shards": {"rows": rows},
            "cluster": {"num_clusters": 4, "iterations": 5},
            "faces": {"scales": [1.0]},
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def flaky_site() -> Iterator[FlakySite]:
    """A web server whose images may fail for a while."""
    site = FlakySite()
    yield site
    site.close()
