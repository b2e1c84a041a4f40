"""A small real data set: photos cut from images that scikit-image ships, in tars, with a manifest."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation import schema
from curation.dinov2.config import TrainConfig

WORKER = Path(__file__).with_name("parallel_worker.py")
SMALL = {
    "model": {"dim": 24, "depth": 2, "heads": 2, "patch_px": 8, "layer_scale": 1.0, "drop_path": 0.25},
    "crops": {"global_px": 32, "local_px": 16, "num_local": 2},
    "heads": {
        "dino": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        "ibot": {"prototypes": 24, "hidden_dim": 32, "bottleneck_dim": 16},
    },
    "optim": {"base_lr": 0.02},
    "schedule": {
        "steps": 8,
        "warmup_steps": 2,
        "freeze_last_layer_steps": 1,
        "momentum": [0.9, 1.0],
        "teacher_temp_warmup_steps": 4,
    },
    "data": {"batch_size": 4},
    "monitors": {"every_steps": 1},
    "checkpoint": {"every_steps": 3, "keep": 2},
}


def merged(tree, changes):
    """Return nested mappings with dotted keys changed."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            tree[section] = merged(tree.get(section, {}), {name: value})
        else:
            tree[section] = value
    return tree


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Models here are so small that a second thread only waits; results do not depend on the machine either.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_settings():
    """Return the small settings."""
    return TrainConfig.model_validate_json(json.dumps(SMALL))


@pytest.fixture
def settings():
    """Return a function that gives the small settings with dotted keys changed."""

    def make(**changes):
        tree = merged(SMALL, {key.replace("__", "."): value for key, value in changes.items()})
        return TrainConfig.model_validate_json(json.dumps(tree))

    return make


def photos(count, side_px=48):
    """Return JPEG bytes of crops of two photos."""
    from skimage import data

    rng = np.random.default_rng(7)
    sources = [data.astronaut(), data.chelsea()]
    encoded = []
    for index in range(count):
        source = sources[index % len(sources)]
        top, left = (int(rng.integers(0, size - side_px)) for size in source.shape[:2])
        file = io.BytesIO()
        Image.fromarray(source[top : top + side_px, left : left + side_px]).save(file, "JPEG", quality=92)
        encoded.append(file.getvalue())
    return encoded


def write_manifest(folder, images, *, num_tars=2, digest=b"ab" * 32):
    """Write images into tars under ``folder/images`` and a manifest under ``folder/manifest``; return its path."""
    (folder / "images").mkdir(parents=True)
    (folder / "manifest").mkdir()
    rows = []
    for number in range(num_tars):
        name = folder / "images" / f"{number:08d}.tar"
        with tarfile.open(name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in images[number::num_tars]:
                image_id = hashlib.sha256(image).hexdigest()[:32]
                info = tarfile.TarInfo(f"{image_id}.jpg")
                info.size = len(image)
                offset = tar.offset + 512
                tar.addfile(info, io.BytesIO(image))
                rows.append((image_id, f"../images/{name.name}", offset, len(image)))
    columns = dict(zip(("image_id", "tar", "tar_offset", "stored_bytes"), zip(*rows, strict=True), strict=True))
    table = pa.table(
        [pa.array(columns.get(field.name, [None] * len(rows)), field.type) for field in schema.MANIFEST],
        schema=schema.MANIFEST.with_metadata({b"curation.digest": digest} if digest else None),
    )
    path = folder / "manifest" / "manifest.parquet"
    pq.write_table(table, path, row_group_size=5)
    return path


@pytest.fixture
def make_manifest():
    """Return ``write_manifest``, for tests that need data of their own."""
    return write_manifest


@pytest.fixture(scope="session")
def jpegs():
    """Return the 20 photos of ``manifest``."""
    return photos(20)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory, jpegs):
    """Return the path of a manifest of 20 photos."""
    return str(write_manifest(tmp_path_factory.mktemp("dataset"), jpegs))


class Processes:
    """Processes that work together, as often as they are told to; what jobs are, ``parallel_worker.py`` says."""

    def __init__(self, folder, size=2):
        arguments = [sys.executable, str(WORKER)]
        environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
        self._folder = folder
        self._workers = []
        for rank in range(size):
            with (folder / f"{rank}.stderr").open("w") as stderr:
                self._workers.append(
                    subprocess.Popen(
                        [*arguments, str(rank), str(size), str(folder / "store")],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                )

    def run(self, *jobs):
        """Run jobs, one after the other; return the errors of each process, by the name of the job's output."""
        for worker in self._workers:
            worker.stdin.write(json.dumps(jobs) + "\n")
            worker.stdin.flush()
        return [self._answer(rank) for rank in range(len(self._workers))]

    def _answer(self, rank):
        for line in self._workers[rank].stdout:  # gloo speaks there too
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        return f"ended with {self._workers[rank].wait()}: {(self._folder / f'{rank}.stderr').read_text()[-3000:]}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for worker in self._workers:
            worker.kill()
            worker.communicate()


@pytest.fixture(scope="session")
def start_processes():
    """Return ``Processes``, for tests that need some of their own."""
    return Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Return two processes; starting them takes longer than most of what they do."""
    with Processes(tmp_path_factory.mktemp("processes")) as both:
        yield both
