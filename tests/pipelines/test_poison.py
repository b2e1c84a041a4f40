"""An image that crashes its decoder costs one row."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from curation.config import ImagesConfig
from curation.crashes import Watch
from curation.store import Run

# What a broken native decoder does, at bytes that only the poisonous image has.
CRASHING_DECODER = """
import ctypes
from PIL import JpegImagePlugin, Image
real = Image.open
def open(stream, *args, **options):
    if b"poison" in stream.getvalue():
        ctypes.string_at(0)
    return real(stream, *args, **options)
Image.open = open
"""


def _jpeg(seed: int, comment: bytes = b"") -> bytes:
    grid = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize((80, 80)).save(buffer, "JPEG", comment=comment)
    return buffer.getvalue()


@pytest.fixture
def site(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A pool of nine images of which one is poisonous, and the environment in which it is."""
    (tmp_path / "pool").mkdir()
    for index in range(8):
        (tmp_path / "pool" / f"{index}.jpg").write_bytes(_jpeg(index))
    (tmp_path / "pool" / "4b.jpg").write_bytes(_with_marker(_jpeg(99)))
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "sitecustomize.py").write_text(CRASHING_DECODER)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"pool": {"inputs": [{"kind": "folder", "path": str(tmp_path / "pool")}]}})
    )
    paths = [str(tmp_path / "decoder"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return tmp_path, os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)}


def _with_marker(jpeg: bytes) -> bytes:
    """Put the marker between coded segments, where no cleaning takes it away."""
    end = jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + b"poison" + jpeg[end:]


def _run(folder: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "curation.cli", "run", "--config", str(folder / "config.yaml")]
    command += ["--run", str(folder / "run"), "--stage", "fetch", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_that_dies_of_an_image_costs_one_row(site):
    folder, environment = site

    done = _run(folder, environment, "--workers", "1")

    assert done.returncode == 0, done.stderr
    reasons = Run(folder / "run").read_table("pool", "fetch", 0, ["reject_reason"]).column(0).to_pylist()
    assert sorted(filter(None, reasons)) == ["crashes_decoder"]
    assert len(reasons) == 9


def test_a_run_that_died_with_its_only_process_goes_on_when_it_is_run_again(site):
    folder, environment = site

    first = _run(folder, environment, "--runner", "threads")
    second = _run(folder, environment, "--runner", "threads")

    assert first.returncode == -11
    assert second.returncode == 0, second.stderr
    reasons = Run(folder / "run").read_table("pool", "fetch", 0, ["reject_reason"]).column(0).to_pylist()
    assert reasons.count("crashes_decoder") == 1
    assert reasons.count(None) == 8


def test_many_poisonous_images_in_a_shard_cost_as_many_rows(site):
    folder, environment = site
    for index in range(5):
        (folder / "pool" / f"5-{index}.jpg").write_bytes(_with_marker(_jpeg(200 + index)))

    done = _run(folder, environment, "--workers", "1")

    assert done.returncode == 0, done.stderr
    reasons = Run(folder / "run").read_table("pool", "fetch", 0, ["reject_reason"]).column(0).to_pylist()
    assert reasons.count("crashes_decoder") == 6
    assert reasons.count(None) == 8


def test_a_folder_that_others_can_write_to_is_not_believed(tmp_path, caplog):
    image_id = "0" * 32
    (tmp_path / "watch").mkdir(mode=0o777)
    (tmp_path / "watch").chmod(0o777)
    (tmp_path / "watch" / "999999-1.ids").write_text(image_id)
    (tmp_path / "watch" / f"{image_id}.crashes").touch()

    watch = Watch(tmp_path / "watch")

    with watch.at_work(image_id, _jpeg(1), ImagesConfig()):
        pass
    assert "not a private folder" in caplog.text


def test_threads_that_ask_at_once_share_one_watch(tmp_path):
    asked = (
        "import concurrent.futures, curation.crashes as c\n"
        "with concurrent.futures.ThreadPoolExecutor(16) as pool:\n"
        "    print(len(set(map(id, pool.map(lambda _: c.watch(), range(64))))))"
    )

    counts = [
        subprocess.run(
            [sys.executable, "-c", asked],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(3)
    ]

    assert counts == ["1"] * 3
