"""Training in processes of a Ray cluster is training in processes; real ones, which may die."""

import json
import os
from pathlib import Path

import pytest
import torch

from curation.dinov2.train import train
from curation.errors import TrainError
from curation.pipelines.ray_runner import RayRunner
from curation.pipelines.ray_train import train_on_ray


@pytest.fixture(scope="module")
def cluster():
    runner = RayRunner()
    yield
    runner.close()


def losses(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return torch.tensor([[line[name] for name in sorted(line) if name.startswith("loss")] for line in lines])


def descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def training_processes():
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(os.getpid())}
    return [pid for pid, name in names.items() if b"_Member" in name]


@pytest.mark.usefixtures("cluster")
def test_two_processes_on_ray_give_the_losses_of_one(manifest, settings, tmp_path):
    config = settings(ray={"workers": 2, "cpus": 0.5}, data__batch_size=8, data__workers=1)
    train(manifest, config, tmp_path / "alone", resume=False, device="cpu")
    seen = []
    options = {"address": None, "device": "cpu", "resume": False}
    result = train_on_ray(manifest, config, tmp_path / "ray", on_step=seen.append, **options)

    assert [report.step for report in seen] == list(range(1, 9))
    assert result.finished
    assert result.teacher.exists()
    assert (losses(tmp_path / "alone") - losses(tmp_path / "ray")).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a process to kill")
def test_training_on_ray_goes_on_when_a_process_dies(manifest, settings, tmp_path):
    config = settings(ray={"workers": 2, "cpus": 0.5}, data__batch_size=8, checkpoint__every_steps=1)
    train(manifest, config, tmp_path / "alone", resume=False, device="cpu")
    seen, killed = [], []

    def kill_one(report):
        seen.append(report.step)
        if report.step >= 2 and not killed:
            killed.append(training_processes()[-1])
            os.kill(killed[0], 9)

    options = {"address": None, "device": "cpu", "resume": False}
    result = train_on_ray(manifest, config, tmp_path / "ray", on_step=kill_one, **options)

    assert killed
    assert (result.steps, seen[-1]) == (8, 8)
    assert (losses(tmp_path / "alone") - losses(tmp_path / "ray")).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_training_on_ray_stops_when_asked_and_says_why_it_cannot_go_on(manifest, settings, tmp_path):
    config = settings(ray={"workers": 2, "cpus": 0.5}, schedule__steps=5000)
    seen = []
    options = {"address": None, "device": "cpu", "resume": False}
    result = train_on_ray(manifest, config, tmp_path, on_step=seen.append, should_stop=lambda: len(seen) > 0, **options)

    assert not result.finished
    assert result.steps == len((tmp_path / "log.jsonl").read_text().splitlines()) == seen[-1].step
    with pytest.raises(TrainError, match="is not empty; go on with --resume"):
        train_on_ray(manifest, config, tmp_path, **options)
