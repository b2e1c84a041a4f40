"""Samples that are made by processes of their own."""

import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch

from curation.dinov2.config import DataConfig
from curation.dinov2.crop_workers import CropWorkers
from curation.dinov2.data import Batches, _workers
from curation.dinov2.manifests import ManifestImages
from curation.errors import TrainError
from curation.processes import start_time

REPO = Path(__file__).parents[2]
LIMIT = 10_000_000

# Without `if __name__ == "__main__"`, as people write scripts; ends only when it is told to.
SCRIPT = """
import sys
from pathlib import Path
from curation.dinov2.config import TrainConfig
from curation.dinov2.train import train

def say(report):
    print(report.step, flush=True)
    sys.stdin.readline()

config = TrainConfig.model_validate_json(sys.argv[2])
print("began", flush=True)
result = train(sys.argv[1], config, Path(sys.argv[3]), resume=False, device="cpu", on_step=say)
print("ended after", result.steps, flush=True)
"""


def batches_of(manifest, config, steps=6):
    return list(Batches([ManifestImages(manifest, LIMIT)], config).between(0, steps))


def assert_same_batches(one, other):
    for parts, others in zip(one, other, strict=True):
        for batch, same in zip(parts, others, strict=True):
            assert (batch.step, batch.images, batch.num_replaced) == (same.step, same.images, same.num_replaced)
            assert batch.mask_NP.equal(same.mask_NP)
            for (crops, plan), (same_crops, same_plan) in zip(batch.crops, same.crops, strict=True):
                assert crops.equal(same_crops)
                assert all((value == getattr(same_plan, name)).all() for name, value in vars(plan).items())


@pytest.mark.parametrize("reading", ["ranged", "streaming"])
def test_any_number_of_processes_makes_the_same_batches_unreadable_images_included(
    make_manifest, settings, jpegs, tmp_path, reading
):
    damaged = [b"no image at all" if index in (3, 8, 9) else image for index, image in enumerate(jpegs)]
    manifest = str(make_manifest(tmp_path, damaged))
    data = {"batch_size": 4, "reading": reading, "chunk_images": 3, "window_chunks": 2, "micro_batches": 2}
    own = batches_of(manifest, settings(data={**data, "workers": 0}))

    assert sum(batch.num_replaced for parts in own for batch in parts) > 0
    for workers, prefetched in ((1, 1), (3, 4)):
        config = settings(data={**data, "workers": workers, "prefetch_batches": prefetched})
        assert_same_batches(own, batches_of(manifest, config))


def test_tars_in_this_process_s_memory_are_read_here(manifest, settings, jpegs, make_manifest, tmp_path):
    make_manifest(tmp_path / "data", jpegs)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "data"), "/crops/run", recursive=True)
    try:
        there = batches_of("memory://crops/run/manifest/manifest.parquet", settings(data__workers=1))
    finally:
        memory.rm("/crops", recursive=True)

    assert_same_batches(batches_of(manifest, settings()), there)


# Whose tars only this process can read: it says itself how.
OWN_FILES = """
import sys
import fsspec
from fsspec.implementations.local import LocalFileSystem
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batches
from curation.dinov2.manifests import ManifestImages

class Mine(LocalFileSystem):
    protocol = "mine"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.removeprefix("mine://"))

fsspec.register_implementation("mine", Mine)
config = TrainConfig.model_validate_json(sys.argv[2])
print(len(list(Batches([ManifestImages("mine://" + sys.argv[1], 1 << 20)], config).between(0, 3))))
"""


def test_tars_of_a_file_system_that_a_script_has_made_are_read_here(manifest, settings):
    config = json.dumps(settings(data__workers=1).model_dump(mode="json"))
    ran = subprocess.run(
        [sys.executable, "-c", OWN_FILES, manifest, config],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (ran.stdout, ran.stderr) == ("3\n", "")


NEEDS_A_KEY = """
import os
import fsspec
from fsspec.implementations.local import LocalFileSystem

class Locked(LocalFileSystem):
    protocol = "locked"

    def cat_file(self, *args, **options):
        if (os.environ.get("LOCKED"), fsspec.config.conf.get("locked")) != ("key", {"key": "other"}):
            raise PermissionError("no key")
        return super().cat_file(*args, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.removeprefix("locked://"))
"""


def test_what_a_file_system_is_opened_with_reaches_processes_whose_server_runs_already(
    manifest, settings, tmp_path, monkeypatch
):
    batches_of(manifest, settings(data__workers=1), 1)
    (tmp_path / "locked_files.py").write_text(NEEDS_A_KEY)
    monkeypatch.syspath_prepend(tmp_path)
    fsspec.register_implementation("locked", importlib.import_module("locked_files").Locked)
    monkeypatch.setenv("LOCKED", "key")
    monkeypatch.setitem(fsspec.config.conf, "locked", {"key": "other"})

    assert_same_batches(batches_of(manifest, settings()), batches_of(f"locked://{manifest}", settings(data__workers=1)))


def test_without_a_number_a_gpu_gets_its_share_of_the_cores_and_a_cpu_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    gpu, asked = torch.device("cuda"), DataConfig(workers=3)

    assert [_workers(DataConfig(), device) for device in (None, torch.device("cpu"), gpu)] == [0, 0, 12]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (_workers(DataConfig(), gpu), _workers(asked, gpu)) == (3, 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)), raising=False)
    assert _workers(DataConfig(), gpu) == 16


def in_a_daemon(answer, manifest, config):
    try:
        batches_of(manifest, config, 1)
    except TrainError as error:
        answer.put(str(error))


def test_a_process_that_must_have_no_children_says_what_to_do(manifest, settings):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=in_a_daemon, args=(answer, manifest, settings(data__workers=1)), daemon=True)
    process.start()
    said = answer.get(timeout=60)
    process.join()

    assert re.search(
        r"1 processes that decode cannot be started \(daemonic .*\); lower data\.workers, or do without: 0", said
    )


def test_a_batch_keeps_its_samples_while_later_ones_are_made(manifest, settings):
    config = settings(data={"batch_size": 4, "workers": 2, "prefetch_batches": 1})
    left = Batches([ManifestImages(manifest, LIMIT)], config).between(0, 8)
    (first,) = next(left)
    before = [crops.clone() for crops, _ in first.crops]
    list(left)

    assert all(crops.equal(as_it_was) for (crops, _), as_it_was in zip(first.crops, before, strict=True))


def test_a_process_that_is_killed_ends_the_run_with_words_and_the_steps_before_are_kept(
    manifest, settings, tmp_path, monkeypatch
):
    started = []
    init = CropWorkers.__init__
    monkeypatch.setattr(CropWorkers, "__init__", lambda self, *a, **kw: started.append(self) or init(self, *a, **kw))
    from curation.dinov2.train import train

    def kill(report):
        if report.step == 2:
            os.kill(started[0]._workers[0].process.pid, signal.SIGKILL)

    config = settings(data={"batch_size": 4, "workers": 1, "prefetch_batches": 1})
    with pytest.raises(
        TrainError, match=r"a process that decodes images has ended \(SIGKILL\) at images \[.*lower data"
    ):
        train(manifest, config, tmp_path / "run", resume=False, device="cpu", on_step=kill)
    assert list((tmp_path / "run/checkpoints").glob("*.safetensors"))


class Script:
    """A process group that trains and says each step."""

    def __init__(self, manifest, config, folder):
        script = folder / "mine.py"
        script.write_text(SCRIPT)
        self.process = subprocess.Popen(
            [sys.executable, script, manifest, json.dumps(config.model_dump(mode="json")), str(folder / "run")],
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self):
        return self.process.stdout.readline().strip()

    def members(self):
        """Return the processes of the group that live, but for the first."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.process.pid and state not in "ZX" and int(stat.parent.name) != self.process.pid:
                found.append(int(stat.parent.name))
        return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_script_without_a_guard_trains_and_leaves_no_process_when_it_is_killed(manifest, settings, tmp_path):
    config = settings(data={"batch_size": 4, "workers": 2})
    script = Script(manifest, config, tmp_path)
    assert [script.line(), script.line()] == ["began", "1"]
    members = script.members()
    assert len(members) >= 3  # the server, and what it forked

    script.process.kill()
    script.process.communicate()

    deadline = time.monotonic() + 20
    while any(map(start_time, members)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(start_time, members))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_server_gets_no_signals_to_all_processes_from_its_first_moment_on(manifest, settings, tmp_path):
    config = settings(data={"batch_size": 4, "workers": 1})
    script = Script(manifest, config, tmp_path)
    assert script.line() == "began"
    deadline = time.monotonic() + 30
    while not (found := [pid for pid in script.members() if b"forkserver" in command_of(pid)]):
        assert time.monotonic() < deadline
    blocked = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{found[0]}/status").read_text())[1], 16)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert blocked >> (number - 1) & 1
        os.kill(found[0], number)
    out, err = script.process.communicate("\n" * 20, timeout=60)

    assert out.split("\n")[-2] == "ended after 8", err
    assert err == ""


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_signals_to_all_processes_are_for_the_first_one_alone(manifest, settings, tmp_path):
    config = settings(data={"batch_size": 4, "workers": 2, "prefetch_batches": 1})
    script = Script(manifest, config, tmp_path)
    assert [script.line(), script.line()] == ["began", "1"]

    for member in script.members():  # as a terminal and a scheduler do
        os.kill(member, signal.SIGINT)
        os.kill(member, signal.SIGTERM)
    out, err = script.process.communicate("\n" * 20, timeout=60)

    assert out.split("\n")[-2] == "ended after 8", err
    assert script.process.returncode == 0
