"""However a step's batch is cut into processes and micro-batches, it is the same step."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from curation.dinov2.data import ManifestImages
from curation.dinov2.network import student_and_teacher
from curation.dinov2.train import train
from curation.dinov2.world import World
from curation.errors import TrainError
from curation.settings import dump

REPO = Path(__file__).parents[2]
STEPS = 5


def job(manifest, config, output, **changes):
    return {
        "manifests": [str(manifest)] * 2,
        "config": config.model_dump(mode="json"),
        "output": str(output),
        "resume": False,
        "stop_after": -1,
        "samples": None,
        "loses_after": {},
        "dies_after": {},
    } | changes


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
def test_two_processes_give_the_losses_of_one(processes, manifest, settings, tmp_path, variant):
    one, both = of(settings, variant), of(settings, variant, data__micro_batches=2)
    cut = of(settings, variant, parallel="fsdp", activation_checkpointing=True)
    together = {"copies": one, "copies_and_parts": both, "cut": cut}
    train(manifest, one, tmp_path / "alone", resume=False, device="cpu")
    assert processes.run(*(job(manifest, config, tmp_path / name) for name, config in together.items())) == [{}, {}]

    for name in together:
        assert_same_losses(tmp_path / "alone", tmp_path / name)
        ours, theirs = (load_file(tmp_path / run / "teacher.safetensors") for run in ("alone", name))
        assert max((ours[key] - theirs[key]).abs().max() for key in ours) <= 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes_after_any_step(
    processes, manifest, settings, tmp_path, monkeypatch, parallel
):
    config, together = of(settings, "softmax_shared"), of(settings, "softmax_shared", parallel=parallel)
    with noted_samples(tmp_path / "alone.samples", monkeypatch):
        train(manifest, config, tmp_path / "alone", resume=False, device="cpu")
    jobs = {}
    for first, second in itertools.combinations(range(1, STEPS), 2):
        name = f"{first}_{second}"
        with noted_samples(tmp_path / f"{name}.samples", monkeypatch):
            train(manifest, config, tmp_path / name, resume=False, device="cpu", should_stop=stop_after(first))
        changes = {"resume": True, "stop_after": second - first, "samples": str(tmp_path / f"{name}.samples")}
        jobs[first, second] = job(manifest, together, tmp_path / name, **changes)
    assert processes.run(*jobs.values()) == [{}, {}]
    for first, second in jobs:
        name = f"{first}_{second}"
        assert len(losses(tmp_path / name)) == second
        with noted_samples(tmp_path / f"{name}.samples", monkeypatch):
            train(manifest, config, tmp_path / name, resume=True, device="cpu")

        assert_same_losses(tmp_path / "alone", tmp_path / name)
        alone, changing = (samples_of(tmp_path / f"{run}.samples") for run in ("alone", name))
        by_both = slice(first * config.data.batch_size, second * config.data.batch_size)
        changing[by_both] = sorted(changing[by_both])
        alone[by_both] = sorted(alone[by_both])
        assert changing == alone
    assert len(jobs) == 6
    assert len(alone) == STEPS * config.data.batch_size


def stop_after(steps):
    seen = []
    return lambda: seen.append(1) or len(seen) == steps


def samples_of(path):
    return list(map(int, path.read_text().split()))


@contextmanager
def noted_samples(path, monkeypatch):
    """Write down which images are read."""
    stored = ManifestImages.stored

    def noted(self, index):
        with path.open("a") as file:
            file.write(f"{index}\n")
        return stored(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ManifestImages, "stored", noted)
        yield


def test_a_student_is_distilled_alike_by_one_process_and_two(processes, manifest, settings, tmp_path):
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
    first, second = processes.run(*jobs)

    assert first.keys() == second.keys() == {"alone"}
    assert first["alone"].endswith("is not empty; go on with --resume, or give another folder")
    assert second["alone"] == f"process 0 failed: {first['alone']}"
    for name in configs:
        assert_same_losses(tmp_path / "alone", tmp_path / name)


def test_heads_are_warmed_up_alike_by_one_process_and_two(processes, manifest, settings, tmp_path):
    save_file(student_and_teacher(settings(seed=1))[0].backbone.state_dict(), tmp_path / "backbone.safetensors")
    start = {"backbone": str(tmp_path / "backbone.safetensors"), "head_warmup_steps": 2}
    configs = {kind: of(settings, "sinkhorn_knopp", start=start, parallel=kind) for kind in ("ddp", "fsdp")}
    parts = of(settings, "sinkhorn_knopp", start=start, data__micro_batches=2)
    train(manifest, configs["ddp"], tmp_path / "alone", resume=False, device="cpu")
    jobs = [job(manifest, config, tmp_path / name) for name, config in {**configs, "parts": parts}.items()]
    assert processes.run(*jobs) == [{}, {}]

    for name in (*configs, "parts"):
        assert_same_losses(tmp_path / "alone", tmp_path / name)


def test_an_error_of_one_process_ends_all_of_them_with_its_words_and_loses_no_step(
    processes, make_manifest, settings, jpegs, tmp_path
):
    here, there = (str(make_manifest(tmp_path / node, jpegs)) for node in ("here", "there"))
    config = of(settings, "sinkhorn_knopp")
    train(here, config, tmp_path / "alone", resume=False, device="cpu")
    lost = job(None, config, tmp_path / "lost", manifests=[here, there], loses_after={"1": 2})
    missing = job(None, config, tmp_path / "missing", manifests=[here, str(tmp_path / "nowhere.parquet")])
    first, second = processes.run(lost, missing)

    assert second["lost"].endswith(
        "00000001.tar is not there; put it back beside the manifest or run `curate run` again"
    )
    assert second["missing"].endswith("there is no such manifest; `curate run` writes one")
    assert first == {name: f"process 1 failed: {error}" for name, error in second.items()}
    stopped = len(losses(tmp_path / "lost"))
    assert (tmp_path / f"lost/checkpoints/step_{stopped:08d}.json").exists()
    assert 2 <= stopped < STEPS
    train(here, config, tmp_path / "lost", resume=True, device="cpu")
    assert_same_losses(tmp_path / "alone", tmp_path / "lost")


def test_processes_do_not_train_together_on_different_images(
    processes, make_manifest, manifest, settings, jpegs, tmp_path
):
    other = str(make_manifest(tmp_path / "other", jpegs, digest=b"cd" * 32))
    different = job(None, of(settings, "sinkhorn_knopp"), tmp_path / "run", manifests=[manifest, other])
    first, second = processes.run(different)

    assert first == second
    assert "were given different settings or manifests" in first["run"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_others_with_a_clear_line(start_processes, manifest, settings, tmp_path):
    dies = job(manifest, of(settings, "sinkhorn_knopp"), tmp_path / "run", dies_after={"1": 2})
    with start_processes(tmp_path) as both:
        first, second = both.run(dies)

    assert second.startswith("ended with 3")
    assert "another process ended" in first["run"]


@pytest.mark.slow
def test_torchrun_starts_what_trains_together(manifest, settings, tmp_path):
    config = of(settings, "sinkhorn_knopp")
    (tmp_path / "my.yaml").write_text(dump(config))
    train(manifest, config, tmp_path / "alone", resume=False, device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "curation.cli", "train", "--manifest", manifest, "--config", str(tmp_path / "my.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
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
