"""However a step's batch is cut into processes and micro-batches, it is the same step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from curation.dinov2.data import ManifestImages
from curation.dinov2.train import train
from curation.dinov2.world import World
from curation.errors import TrainError
from curation.settings import dump

WORKER = Path(__file__).with_name("parallel_worker.py")
STEPS = 5


def run_together(folder, jobs, size=2):
    """Run jobs in several processes."""
    arguments = [str(size), str(folder / "store"), json.dumps(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(outputs)
    return {path.name: path.read_text() for path in folder.glob("*.error")}


def job(manifest, config, output, resume=False, stop_after=-1):
    return {
        "manifest": str(manifest),
        "config": config.model_dump(mode="json"),
        "output": str(output),
        "resume": resume,
        "stop_after": stop_after,
    }


def losses(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return torch.tensor([[line[name] for name in sorted(line) if name.startswith("loss")] for line in lines])


def monitored(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    names = ("teacher_kl", "prototypes_used", "rank", "koleo_distance")
    return torch.tensor([[line[name] for name in names] for line in lines])


def assert_same_losses(one, other):
    assert (losses(one) - losses(other)).abs().max() <= 1e-5
    torch.testing.assert_close(monitored(one), monitored(other), rtol=1e-3, atol=1e-3)


VARIANTS = {
    "sinkhorn_knopp": {},
    "softmax_shared": {"losses": {"centring": "softmax"}, "heads__ibot": None},
}


def of(settings, variant, **changes):
    return settings(schedule__steps=STEPS, data__batch_size=8, **VARIANTS[variant], **changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_give_the_losses_of_the_whole_batch(manifest, settings, tmp_path, variant):
    for name, micro_batches in (("whole", 1), ("parts", 4)):
        config = of(settings, variant, data__micro_batches=micro_batches)
        train(manifest, config, tmp_path / name, resume=False, device="cpu")

    assert len(losses(tmp_path / "whole")) == STEPS
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")


def test_a_part_may_have_no_row_that_runs_a_block(manifest, settings, tmp_path):
    for name, micro_batches in (("whole", 1), ("single_images", 8)):
        # Class tokens that run no block are equal: the gradient of KoLeo is that of rounding errors.
        changes = {"model__drop_path": 0.7, "losses": {"koleo_weight": 0}, "data__micro_batches": micro_batches}
        config = of(settings, "sinkhorn_knopp", **changes)
        train(manifest, config, tmp_path / name, resume=False, device="cpu")

    assert_same_losses(tmp_path / "whole", tmp_path / "single_images")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_the_losses_of_one(manifest, settings, tmp_path, variant):
    one, both = of(settings, variant), of(settings, variant, data__micro_batches=2)
    cut = of(settings, variant, parallel="fsdp", activation_checkpointing=True)
    together = {"copies": one, "copies_and_parts": both, "cut": cut}
    train(manifest, one, tmp_path / "alone", resume=False, device="cpu")
    jobs = [job(manifest, config, tmp_path / name) for name, config in together.items()]
    assert run_together(tmp_path, jobs) == {}

    for name in together:
        assert_same_losses(tmp_path / "alone", tmp_path / name)
        ours, theirs = (load_file(tmp_path / run / "teacher.safetensors") for run in ("alone", name))
        assert max((ours[key] - theirs[key]).abs().max() for key in ours) <= 1e-4


@pytest.mark.parametrize("stops", [(1, 2), (3, 4)])
def test_a_run_goes_on_with_another_number_of_processes(manifest, settings, tmp_path, monkeypatch, stops):
    config, cut = of(settings, "softmax_shared"), of(settings, "softmax_shared", parallel="fsdp")
    samples_of(tmp_path / "alone", monkeypatch)
    train(manifest, config, tmp_path / "alone", resume=False, device="cpu")
    samples_of(tmp_path / "changing", monkeypatch)
    train(manifest, config, tmp_path / "changing", resume=False, device="cpu", should_stop=stop_after(stops[0]))
    first = job(manifest, cut, tmp_path / "changing", resume=True, stop_after=stops[1] - stops[0])
    assert run_together(tmp_path, [first]) == {}
    assert len(losses(tmp_path / "changing")) == stops[1]
    train(manifest, config, tmp_path / "changing", resume=True, device="cpu")

    assert_same_losses(tmp_path / "alone", tmp_path / "changing")
    alone, changing = (samples_of(tmp_path / name, monkeypatch) for name in ("alone", "changing"))
    assert len(alone) == STEPS * config.data.batch_size
    assert changing == alone


def stop_after(steps):
    seen = []
    return lambda: seen.append(1) or len(seen) == steps


def samples_of(output, monkeypatch):
    """Have processes write down which images they read for a run; return what was written so far, sorted."""
    path = output.with_name(f"{output.name}.samples")
    monkeypatch.setenv("TEST_SAMPLES", str(path))
    monkeypatch.setattr(ManifestImages, "read", noted(READ))
    return sorted(map(int, path.read_text().split())) if path.exists() else []


READ = ManifestImages.read


def noted(read):
    """Return a function that reads an image and writes its number down first."""

    def note(self, index):
        with open(os.environ["TEST_SAMPLES"], "a") as file:
            file.write(f"{index}\n")
        return read(self, index)

    return note


def test_a_student_is_distilled_alike_by_one_process_and_two(manifest, settings, tmp_path):
    train(manifest, of(settings, "sinkhorn_knopp"), tmp_path / "teacher", resume=False, device="cpu")
    student = {
        "distillation": {"teacher": str(tmp_path / "teacher")},
        "model": {"dim": 16, "depth": 1, "heads": 2, "patch_px": 8, "layer_scale": 1.0},
        "losses": {"masked_share": 0},
    }
    configs = {kind: of(settings, "sinkhorn_knopp", **student, parallel=kind) for kind in ("ddp", "fsdp")}
    train(manifest, configs["ddp"], tmp_path / "alone", resume=False, device="cpu")
    refused = job(manifest, configs["ddp"], tmp_path / "alone")  # by the first process, which alone looks
    jobs = [refused, *[job(manifest, config, tmp_path / name) for name, config in configs.items()]]
    errors = run_together(tmp_path, jobs)

    assert "is not empty; go on with --resume" in errors.pop("alone.0.error")
    assert errors == {"alone.1.error": "another process failed; its message says why"}
    for name in configs:
        assert_same_losses(tmp_path / "alone", tmp_path / name)


@pytest.mark.slow
def test_torchrun_starts_what_trains_together(manifest, settings, tmp_path):
    config = of(settings, "sinkhorn_knopp")
    (tmp_path / "my.yaml").write_text(dump(config))
    train(manifest, config, tmp_path / "alone", resume=False, device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "curation.cli", "train", "--manifest", manifest, "--config", str(tmp_path / "my.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run"), "--device", "cpu"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.count("checkpoint  ") == 1  # one of them speaks
    assert_same_losses(tmp_path / "alone", tmp_path / "run")


def test_a_batch_is_cut_into_equal_parts_in_order():
    parts = [part for rank in range(3) for part in World(rank, 3).parts(12, 2)]

    assert parts == [range(start, start + 2) for start in range(0, 12, 2)]
    with pytest.raises(TrainError, match="multiple of 3 processes x 2 micro-batches = 6"):
        World(0, 3).parts(16, 2)
