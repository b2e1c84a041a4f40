"""An image that crashes or hangs its process costs one row, wherever it does and whoever runs."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from curation.config.images import ImagesConfig
from curation.crashes import Watch
from curation.errors import ImageError
from curation.journal import Journal
from curation.store import Run

# What broken native code does, at bytes that only a poisonous image has: in the decoder, or in what only a stage calls.
BROKEN_DECODER = """
from PIL import JpegImagePlugin, Image
real = Image.open
def open(stream, *args, **options):
    if b"poison" in stream.getvalue():
        {harm}
    return real(stream, *args, **options)
Image.open = open
"""
BROKEN_STAGE = """
import curation.stages.small_grey as stage
real = stage.small_luma
def small_luma(data, *args, **options):
    if b"poison" in data:
        {harm}
    return real(data, *args, **options)
stage.small_luma = small_luma
"""
SEGFAULT = "import ctypes; ctypes.string_at(0)"
ABORT = "import os; os.abort()"
HANG = "import ctypes; ctypes.PyDLL(None).sleep(3600)"  # a PyDLL does not give the interpreter to other threads


def _jpeg(seed: int, comment: bytes = b"") -> bytes:
    grid = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize((80, 80)).save(buffer, "JPEG", comment=comment)
    return buffer.getvalue()


def _with_marker(jpeg: bytes) -> bytes:
    """Put the marker between coded segments, where no cleaning takes it away."""
    end = jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + b"poison" + jpeg[end:]


class Site:
    """A pool of eight good images and some poisonous ones, and the code that they poison."""

    def __init__(self, folder: Path, broken: str, num_poisonous: int = 1, **images: float) -> None:
        self.folder = folder
        (folder / "pool").mkdir()
        for index in range(8):
            (folder / "pool" / f"{index}.jpg").write_bytes(_jpeg(index))
        for index in range(num_poisonous):
            (folder / "pool" / f"{index + 3}b.jpg").write_bytes(_with_marker(_jpeg(99 + index)))
        (folder / "broken").mkdir()
        (folder / "broken" / "sitecustomize.py").write_text(broken)
        pool = {"inputs": [{"kind": "folder", "path": str(folder / "pool")}]}
        settings = {"pool": pool, "images": images, "pca_hash": {"pca": "default"}}
        settings["resources"] = {"default": {"workers": 1}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        paths = [str(folder / "broken"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder)}
        self.environment["RAY_TMPDIR"] = "/tmp"  # noqa: S108  # names of sockets are short

    def run(self, *options: str, stage: str = "fetch") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "curation.cli", "run", "--config", str(self.folder / "config.yaml")]
        command += ["--run", str(self.folder / "run"), "--stage", stage, *options]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=280, check=False)

    def rejected(self, step: str = "fetch", column: str = "reject_reason") -> list[str]:
        reasons = Run(self.folder / "run").read_table("pool", step, 0, [column]).column(0)
        return [reason for reason in reasons.to_pylist() if reason]

    def num_hashes(self) -> int:
        hashes = Run(self.folder / "run").read_table("pool", "pca_hash", 0).column("pca_hash")
        return len(hashes) - hashes.null_count


@pytest.mark.parametrize("runner", [("--workers", "1"), ("--runner", "ray")], ids=["processes", "ray"])
def test_a_process_that_dies_of_an_image_costs_one_row(tmp_path, runner):
    site = Site(tmp_path, BROKEN_DECODER.format(harm=SEGFAULT))

    done = site.run(*runner)

    assert done.returncode == 0, done.stderr
    assert site.rejected() == ["crashes_decoder"]


def test_a_run_that_died_with_its_only_process_goes_on_when_it_is_run_again(tmp_path):
    site = Site(tmp_path, BROKEN_DECODER.format(harm=SEGFAULT))

    first = site.run("--runner", "threads")
    second = site.run("--runner", "threads")

    assert first.returncode == -11
    assert second.returncode == 0, second.stderr
    assert site.rejected() == ["crashes_decoder"]


def test_many_poisonous_images_in_a_shard_cost_as_many_rows(tmp_path):
    site = Site(tmp_path, BROKEN_DECODER.format(harm=SEGFAULT), num_poisonous=6)

    done = site.run("--workers", "1")

    assert done.returncode == 0, done.stderr
    assert site.rejected() == ["crashes_decoder"] * 6


@pytest.mark.parametrize("runner", [("--workers", "1"), ("--runner", "ray")], ids=["processes", "ray"])
def test_images_that_crash_only_what_a_stage_does_cost_a_row_each(tmp_path, runner):
    site = Site(tmp_path, BROKEN_STAGE.format(harm=ABORT), num_poisonous=2)

    done = site.run(*runner, stage="pca_hash")

    assert done.returncode == 0, done.stderr
    assert site.rejected() == []
    assert site.num_hashes() == 8


@pytest.mark.parametrize(
    "runner",
    [
        pytest.param(("--workers", "1"), id="processes"),
        pytest.param(("--runner", "ray"), id="ray", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_that_hangs_and_keeps_the_interpreter_costs_one_row(tmp_path, runner):
    site = Site(tmp_path, BROKEN_DECODER.format(harm=HANG), decode_timeout_s=4.0)

    done = site.run(*runner)

    assert done.returncode == 0, done.stderr
    assert site.rejected() == ["decode_timeout"]


@pytest.mark.slow
def test_a_stage_that_hangs_on_an_image_costs_one_row(tmp_path):
    site = Site(tmp_path, BROKEN_STAGE.format(harm=HANG), prepare_timeout_s=4.0)

    done = site.run("--workers", "1", stage="pca_hash")

    assert done.returncode == 0, done.stderr
    assert site.num_hashes() == 8


def test_a_folder_that_others_can_write_to_is_not_believed(tmp_path, caplog):
    image_id = "0" * 32
    (tmp_path / "watch").mkdir(mode=0o777)
    (tmp_path / "watch").chmod(0o777)
    (tmp_path / "watch" / f"{image_id}.crashes_decoder").touch()

    watch = Watch(tmp_path / "watch")

    with watch.at_work(image_id, _jpeg(1), ImagesConfig()):
        pass
    assert "not a private folder" in caplog.text


def _leave_journal(folder: Path, *images: tuple[str, bool], late: bool = False) -> None:
    """Leave what a process leaves that dies with images at work."""
    journal = Journal(folder)
    for image_id, is_alone in images:
        journal.enter(image_id, is_alone, 30.0)
    (mine,) = folder.glob(f"{os.getpid()}-*.ids")
    dead = folder / f"999999999-{len(list(folder.iterdir()))}.ids"
    mine.rename(dead)
    if late:
        dead.with_suffix(".late").write_bytes(b"late")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private folder of journals."""
    (tmp_path / "watch").mkdir(mode=0o700)
    return tmp_path / "watch"


A, B = "a" * 32, "b" * 32


def _is_refused(watch: Watch, image_id: str) -> str | None:
    try:
        with watch.at_work(image_id, _jpeg(1), ImagesConfig()):
            return None
    except ImageError as error:
        return error.reason


def test_an_image_that_two_processes_died_of_alone_is_refused(folder):
    _leave_journal(folder, (A, True))
    _leave_journal(folder, (A, True))

    assert _is_refused(Watch(folder), A) == "crashes_decoder"


def test_an_image_whose_deadline_ended_two_processes_is_refused_as_late(folder):
    _leave_journal(folder, (A, True), late=True)
    _leave_journal(folder, (A, True), late=True)

    assert _is_refused(Watch(folder), A) == "decode_timeout"


def test_one_death_alone_may_be_chance(folder):
    _leave_journal(folder, (A, True))

    assert _is_refused(Watch(folder), A) is None


def test_a_good_image_is_a_suspect_until_it_has_been_alone(folder):
    for _ in range(5):
        _leave_journal(folder, (A, False), (B, False))
    watch = Watch(folder)

    assert _is_refused(watch, A) is None
    assert not list(folder.glob(f"{A}.*"))
    assert len(list(folder.glob(f"{B}.*.company"))) == 5


def test_of_those_in_company_a_deadline_accuses_the_one_that_was_due(folder):
    _leave_journal(folder, (B, False), (A, False), late=True)

    Watch(folder)

    assert [path.name[:32] for path in folder.glob("*.company")] == [B]


def test_reading_a_journal_twice_counts_once(folder):
    _leave_journal(folder, (A, True))
    (journal,) = folder.glob("999999999-*.ids")
    text = journal.read_bytes()
    first = Watch(folder).num_findings()

    journal.write_bytes(text)  # another process was as quick

    assert Watch(folder).num_findings() == first == 1


def test_a_suspect_works_alone(folder):
    _leave_journal(folder, (A, True))
    watch, running, overlaps = Watch(folder), set(), []
    lock = threading.Lock()

    def work(name: str) -> None:
        with watch.at_work(name, b"", ImagesConfig()):
            with lock:
                running.add(name)
                overlaps.append(frozenset(running))
            time.sleep(0.001)
            with lock:
                running.discard(name)

    names = [f"{index:032x}" for index in range(40)]
    threads = [threading.Thread(target=work, args=(name,)) for name in [*names[:20], A, *names[20:]]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {seen for seen in overlaps if A in seen} == {frozenset({A})}


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
