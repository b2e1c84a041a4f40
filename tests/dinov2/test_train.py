import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from curation.cli import main
from curation.dinov2.config import TrainConfig
from curation.dinov2.log import read
from curation.dinov2.objective import Inputs
from curation.dinov2.train import train
from curation.errors import CurationError, DiskFullError, TrainError
from curation.settings import dump, load

REPO = Path(__file__).parents[2]
TIMES = {"images_per_s", "peak_memory_gb"}


def lines(output):
    with (output / "log.jsonl").open() as file:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in file]


def newest_tensors(result):
    return load_file(result.checkpoint)


def assert_same_run(one, other):
    ours, theirs = newest_tensors(one), newest_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.equal(theirs[name]), name
    assert lines(one.log.parent) == lines(other.log.parent)


@pytest.fixture(scope="module")
def uninterrupted(manifest, small_settings, tmp_path_factory):
    return train(manifest, small_settings, tmp_path_factory.mktemp("run"), resume=False, device="cpu")


def test_two_runs_are_equal_to_the_bit(manifest, settings, uninterrupted, tmp_path):
    assert_same_run(uninterrupted, train(manifest, settings(), tmp_path, resume=False, device="cpu"))


def test_reading_threads_change_nothing(manifest, settings, uninterrupted, tmp_path):
    config = settings(data__workers=3, data__prefetch_batches=3)
    assert_same_run(uninterrupted, train(manifest, config, tmp_path, resume=False, device="cpu"))


def test_another_seed_gives_another_run(manifest, settings, uninterrupted, tmp_path):
    other = train(manifest, settings(seed=1), tmp_path, resume=False, device="cpu")

    assert other.losses["loss"] != uninterrupted.losses["loss"]


@pytest.mark.parametrize("stop_after", [1, 3, 5, 7])
def test_a_stopped_and_resumed_run_is_equal_to_the_bit(manifest, settings, uninterrupted, tmp_path, stop_after):
    done = []
    stopped = train(
        manifest,
        settings(),
        tmp_path,
        resume=False,
        device="cpu",
        on_step=done.append,
        should_stop=lambda: len(done) == stop_after,
    )
    assert (stopped.steps, stopped.finished) == (stop_after, False)

    resumed = train(manifest, settings(data__workers=1), tmp_path, resume=True, device="cpu")

    assert (resumed.steps, resumed.finished) == (8, True)
    assert_same_run(uninterrupted, resumed)


@pytest.mark.parametrize("settings_of", ["shared_softmax", "class_token_only"])
def test_centres_and_shared_heads_resume_to_the_bit(manifest, settings, tmp_path, settings_of):
    changes = {"losses": {"centring": "softmax", "mask_count": "reference"}, "heads__ibot": None}
    if settings_of == "class_token_only":  # DINO as first published: no masks, no patches, no KoLeo
        changes["losses"] |= {"ibot_weight": 0, "masked_share": 0, "koleo_weight": 0}
    config = settings(**changes)
    whole = train(manifest, config, tmp_path / "whole", resume=False, device="cpu")
    done = []
    train(
        manifest,
        config,
        tmp_path / "parts",
        resume=False,
        device="cpu",
        on_step=done.append,
        should_stop=lambda: len(done) == 4,
    )
    resumed = train(manifest, config, tmp_path / "parts", resume=True, device="cpu")

    assert_same_run(whole, resumed)
    assert newest_tensors(whole)["centre/dino"].abs().max() > 0
    assert ("loss_ibot" in whole.losses) == (settings_of == "shared_softmax")


class CrashError(Exception):
    pass


@pytest.mark.parametrize("crash_after", [2, 4, 7])
def test_a_run_that_died_between_checkpoints_is_equal_to_the_bit(
    manifest, settings, uninterrupted, tmp_path, crash_after
):
    def die(report):
        if report.step == crash_after:
            raise CrashError

    with pytest.raises(CrashError):
        train(manifest, settings(), tmp_path, resume=False, device="cpu", on_step=die)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "los')  # a line that a kill cut short

    assert_same_run(uninterrupted, train(manifest, settings(), tmp_path, resume=True, device="cpu"))


def test_a_killed_process_resumes_to_the_same_weights(manifest, settings, uninterrupted, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump(settings()))
    program = (
        "import sys, pathlib, time\n"
        "from curation.settings import load\n"
        "from curation.dinov2.config import TrainConfig\n"
        "from curation.dinov2.train import train\n"
        "manifest, config, output = sys.argv[1:]\n"
        "train(manifest, load(TrainConfig, config), pathlib.Path(output), resume=True, device='cpu',"
        " on_step=lambda report: time.sleep(0.05))\n"
    )
    output = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}  # as many as here
    process = subprocess.Popen([sys.executable, "-c", program, manifest, str(config), str(output)], env=environment)
    log = output / "log.jsonl"
    deadline = time.monotonic() + 60
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and (not log.exists() or log.read_bytes().count(b"\n") < 4)
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    assert_same_run(uninterrupted, train(manifest, settings(), output, resume=True, device="cpu"))


def truncate(checkpoint):
    os.truncate(checkpoint, checkpoint.stat().st_size - 1)


def tell_another_step(checkpoint):
    marker = checkpoint.with_suffix(".json")
    marker.write_text(marker.read_text().replace('"step": 8', '"step": 7'))


def count_in_words(checkpoint):
    marker = checkpoint.with_suffix(".json")
    marker.write_text(marker.read_text().replace('"num_updates": 8', '"num_updates": "8"'))


def write_a_list(checkpoint):
    checkpoint.with_suffix(".json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, tell_another_step, count_in_words, write_a_list])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, manifest, settings, tmp_path, caplog, damage):
    shutil.copytree(uninterrupted.log.parent, tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step_00000008.safetensors")

    assert_same_run(uninterrupted, train(manifest, settings(), tmp_path / "run", resume=True, device="cpu"))
    assert "is damaged and was passed over" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(uninterrupted, manifest, settings, tmp_path):
    shutil.copytree(uninterrupted.log.parent, tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").glob("*.safetensors"):
        truncate(checkpoint)
    before = (tmp_path / "run/log.jsonl").read_bytes()

    with pytest.raises(TrainError, match="all checkpoints are damaged; put a copy back, or delete them"):
        train(manifest, settings(), tmp_path / "run", resume=True, device="cpu")
    assert (tmp_path / "run/log.jsonl").read_bytes() == before


def test_what_something_else_wrote_into_the_log_costs_no_line_of_it(manifest, settings, uninterrupted, tmp_path):
    train(manifest, settings(), tmp_path, resume=False, device="cpu", should_stop=stop_after(4))
    log = tmp_path / "log.jsonl"
    first, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"\xff\n[1]\n" + first + b'{"step": "2"}\n' + b"".join(rest) + b"{}\n")
    resumed = train(manifest, settings(), tmp_path, resume=True, device="cpu")

    assert [line["step"] for line in read(log)] == list(range(1, 9))
    assert all(value.equal(newest_tensors(uninterrupted)[name]) for name, value in newest_tensors(resumed).items())


def stop_after(steps):
    seen = []
    return lambda: seen.append(1) or len(seen) == steps


def test_resuming_a_finished_run_does_nothing(manifest, settings, tmp_path):
    first = train(manifest, settings(), tmp_path, resume=False, device="cpu")
    again = train(manifest, settings(), tmp_path, resume=True, device="cpu", on_step=pytest.fail)

    assert again == first


def test_the_newest_checkpoints_are_kept(uninterrupted):
    names = sorted(path.name for path in uninterrupted.checkpoint.parent.iterdir())

    assert names == [f"step_{step:08d}.{kind}" for step in (6, 8) for kind in ("json", "safetensors")]


def test_the_best_checkpoint_is_kept_beside_the_newest(manifest, settings, tmp_path):
    changes = {"checkpoint": {"every_steps": 2, "keep": 1, "best_metric": "rank"}}
    done = []
    for resume in (False, True):  # what is best survives an interruption
        train(
            manifest,
            settings(**changes),
            tmp_path,
            resume=resume,
            device="cpu",
            on_step=done.append,
            should_stop=lambda: len(done) == 5,
        )
    best = max(done, key=lambda report: report.figures["rank"])

    kept = {path.name for path in (tmp_path / "checkpoints").glob("*.safetensors")}
    assert kept == {f"step_{step:08d}.safetensors" for step in (best.step, 8)}
    tensors = load_file(tmp_path / "checkpoints" / f"step_{best.step:08d}.safetensors")
    teacher = load_file(tmp_path / "teacher_best.safetensors")
    assert teacher["norm.weight"].equal(tensors["teacher/backbone.norm.weight"])
    newest = json.loads((tmp_path / "checkpoints/step_00000008.json").read_text())
    assert newest["progress"]["best"] == {"step": best.step, "metric": "rank", "value": best.figures["rank"]}
    assert newest["sample_cursor"] == 8 * 4
    assert [source["digest"] for source in newest["manifests"]] == ["ab" * 32]


@pytest.mark.parametrize("reading", ["ranged", "streaming"])
def test_a_mixture_resumes_to_the_bit_wherever_its_manifests_are(make_manifest, settings, jpegs, tmp_path, reading):
    def config(folder, weight=1.0):
        entries = [
            {"path": str(tmp_path / folder / name / "manifest/manifest.parquet"), "weight": weight}
            for name, weight in (("a", 3.0), ("b", weight))
        ]
        data = {"batch_size": 4, "manifests": entries, "reading": reading, "chunk_images": 3, "window_chunks": 2}
        return settings(data=data, schedule__steps=4)

    make_manifest(tmp_path / "here" / "a", jpegs[:8], digest=b"aa" * 32)
    make_manifest(tmp_path / "here" / "b", jpegs[8:], digest=b"bb" * 32)
    whole = train(None, config("here"), tmp_path / "whole", resume=False, device="cpu")
    train(None, config("here"), tmp_path / "parts", resume=False, device="cpu", should_stop=lambda: True)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(TrainError, match=r"weight 1\), but this one is .*weight 2\)"):
        train(None, config("there", 2.0), tmp_path / "parts", resume=True, device="cpu")

    assert_same_run(whole, train(None, config("there"), tmp_path / "parts", resume=True, device="cpu"))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--manifest", "m.parquet", "--config", str(REPO / "configs/dinov2/tiny.yaml"), "--output"],
        ["export-model", "--run", "run", "--format", "timm", "--output"],
        ["export-model", "--output", "out", "--format", "timm", "--run"],
    ],
)
def test_a_store_is_no_place_for_a_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "s3://bucket/run"]) == 2
    assert "s3://bucket/run: must be on a disk of this machine" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_all_whom_the_umask_lets_may_read_what_is_written(uninterrupted):
    for path in (uninterrupted.teacher, uninterrupted.checkpoint, uninterrupted.checkpoint.with_suffix(".json")):
        assert path.stat().st_mode == uninterrupted.log.stat().st_mode


def test_every_line_of_the_log_is_complete(uninterrupted):
    log = lines(uninterrupted.log.parent)

    assert [line["step"] for line in log] == list(range(1, 9))
    for line in log:
        assert all(isinstance(value, (int, float)) for value in line.values())
        parts = sum(value for name, value in line.items() if name.startswith("loss_"))
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
        assert {"lr", "weight_decay", "momentum", "teacher_temp", "teacher_entropy", "koleo", "rank"} <= line.keys()
        assert {"grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"} <= line.keys()
    assert log[0]["last_layer_lr"] == 0


def test_the_exported_teacher_is_the_teacher(uninterrupted):
    teacher, tensors = load_file(uninterrupted.teacher), newest_tensors(uninterrupted)

    assert teacher["blocks.1.attn.qkv.weight"].equal(tensors["teacher/backbone.blocks.1.attn.qkv.weight"])
    assert "mask_token" not in teacher


def test_an_unreadable_image_is_replaced_and_counted(make_manifest, settings, jpegs, tmp_path, caplog):
    damaged = list(jpegs)
    damaged[3] = b"no image at all"
    damaged[8] = jpegs[8][:200]
    manifest = str(make_manifest(tmp_path / "data", damaged))

    result = train(manifest, settings(), tmp_path / "run", resume=False, device="cpu")

    assert result.finished
    replaced = [line["replaced_images"] for line in lines(tmp_path / "run")]
    # 8 steps of 4 are one epoch of 20 and 12 more: each of the two is met at least once.
    assert replaced[-1] >= 2
    assert replaced == sorted(replaced)
    assert caplog.text.count("is unreadable and was replaced") == replaced[-1]
    assert "00000001.tar at byte" in caplog.text


def test_only_unreadable_images_stop_the_run(make_manifest, settings, tmp_path):
    manifest = str(make_manifest(tmp_path / "data", [b"broken %d" % i for i in range(8)]))

    with pytest.raises(TrainError, match="5 images in a row cannot be read"):
        train(manifest, settings(data__max_replacements=4), tmp_path / "run", resume=False, device="cpu")


def test_fewer_images_than_a_batch_are_refused(manifest, settings, tmp_path):
    with pytest.raises(
        TrainError, match=r"holds 20 images, fewer than a batch of 21; .* data\.batch_size to at most 20"
    ):
        train(manifest, settings(data__batch_size=21), tmp_path, resume=False, device="cpu")


def test_an_empty_manifest_is_refused(manifest, settings, tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(manifest).slice(0, 0), empty)

    with pytest.raises(TrainError, match="has no rows"):
        train(str(empty), settings(), tmp_path / "run", resume=False, device="cpu")


def test_a_missing_manifest_is_refused(settings, tmp_path):
    with pytest.raises(TrainError, match="there is no such manifest"):
        train(str(tmp_path / "nothing.parquet"), settings(), tmp_path / "run", resume=False, device="cpu")


def test_a_file_that_is_no_manifest_is_refused(settings, tmp_path):
    other = tmp_path / "text.parquet"
    other.write_text("hello")

    with pytest.raises(TrainError, match="cannot be read as a Parquet manifest"):
        train(str(other), settings(), tmp_path / "run", resume=False, device="cpu")


def test_a_missing_tar_is_named(make_manifest, settings, jpegs, tmp_path):
    manifest = make_manifest(tmp_path / "data", jpegs)
    (tmp_path / "data/images/00000001.tar").unlink()

    with pytest.raises(TrainError, match=r"1 of 2 tars, such as .*00000001\.tar, is not there"):
        train(str(manifest), settings(), tmp_path / "run", resume=False, device="cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_that_goes_missing_stops_the_run_and_loses_no_step(
    make_manifest, settings, uninterrupted, jpegs, tmp_path, workers
):
    manifest = str(make_manifest(tmp_path / "data", jpegs))
    tar, away = tmp_path / "data/images/00000001.tar", tmp_path / "away.tar"
    config = settings(data__workers=workers, data__prefetch_batches=1)
    done = []

    def lose_the_tar(report):
        done.append(report.step)
        if report.step == 4:
            tar.rename(away)

    with pytest.raises(TrainError, match=r"00000001\.tar is not there; put it back beside the manifest"):
        train(manifest, config, tmp_path / "run", resume=False, device="cpu", on_step=lose_the_tar)
    assert (tmp_path / f"run/checkpoints/step_{done[-1]:08d}.json").exists()
    away.rename(tar)

    assert_same_run(uninterrupted, train(manifest, config, tmp_path / "run", resume=True, device="cpu"))


def test_another_manifest_is_not_resumed(make_manifest, manifest, settings, jpegs, tmp_path):
    train(manifest, settings(schedule__steps=2), tmp_path / "run", resume=False, device="cpu")
    other = str(make_manifest(tmp_path / "data", jpegs, digest=b"cd" * 32))

    with pytest.raises(TrainError, match=r"was trained on manifest abab.* but this one is cdcd"):
        train(other, settings(schedule__steps=2), tmp_path / "run", resume=True, device="cpu")


def test_other_settings_are_not_resumed(manifest, settings, tmp_path):
    train(manifest, settings(schedule__steps=2), tmp_path, resume=False, device="cpu")

    with pytest.raises(TrainError, match=r"crops\.num_local: 2 → 3.*schedule\.steps: 2 → 4"):
        train(manifest, settings(schedule__steps=4, crops__num_local=3), tmp_path, resume=True, device="cpu")


def test_a_used_folder_needs_resume(manifest, settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(TrainError, match="is not empty; go on with --resume, or give another folder"):
        train(manifest, settings(), tmp_path, resume=False, device="cpu")
    with pytest.raises(TrainError, match="holds no training run to resume"):
        train(manifest, settings(), tmp_path, resume=True, device="cpu")


def test_a_run_that_failed_before_its_first_step_leaves_nothing_in_the_way(manifest, settings, tmp_path):
    wrong = settings(start={"backbone": str(tmp_path / "nowhere.pth")}, heads__ibot=None)
    unreadable = settings(monitors={"knn": {"data": {"path": str(tmp_path / "nowhere.parquet")}}})
    for config in (wrong, unreadable):
        with pytest.raises(CurationError, match="nowhere"):
            train(manifest, config, tmp_path / "run", resume=False, device="cpu")
    stopped = train(manifest, settings(), tmp_path / "run", resume=False, device="cpu", should_stop=lambda: True)

    assert stopped.steps == 1


def test_a_device_that_is_not_there_is_refused(manifest, settings, tmp_path):
    with pytest.raises(TrainError, match="device 'nosuch' cannot be used"):
        train(manifest, settings(), tmp_path, resume=False, device="nosuch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(manifest, settings, tmp_path):
    for name in ("cuda", "cuda:1"):
        with pytest.raises(TrainError, match=f"device '{name}' cannot be used: .*; try cpu"):
            train(manifest, settings(), tmp_path, resume=False, device=name)


def test_the_parts_of_a_batch_stay_where_they_are_part_of_the_objective(manifest, settings, tmp_path):
    scoped = {scope: settings(losses__koleo_scope=scope, data__micro_batches=2) for scope in ("local", "global")}
    for scope in scoped:
        whole = settings(losses__koleo_scope=scope)
        train(manifest, whole, tmp_path / scope, resume=False, device="cpu", should_stop=stop_after(2))
    assert train(manifest, scoped["global"], tmp_path / "global", resume=True, device="cpu").finished
    with pytest.raises(TrainError, match=r"data\.micro_batches: 1 → 2"):
        train(manifest, scoped["local"], tmp_path / "local", resume=True, device="cpu")


def test_a_device_without_memory_is_one_clear_line(manifest, settings, tmp_path, monkeypatch):
    def too_large(*_, **__):  # as PyTorch says it of a GPU
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(Inputs, "of", too_large)
    with pytest.raises(
        TrainError, match=r"raise data\.micro_batches .*\(CUDA out of memory\. Tried to allocate 2\.00 GiB"
    ):
        train(manifest, settings(), tmp_path, resume=False, device="cpu")


def test_sigterm_saves_and_the_same_command_goes_on(manifest, settings, uninterrupted, tmp_path):
    (tmp_path / "my.yaml").write_text(dump(settings()))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}  # as many as here
    command = [sys.executable, "-c", SLOWLY, "train", "--manifest", manifest, "--config", str(tmp_path / "my.yaml")]
    command += ["--output", str(tmp_path / "run"), "--device", "cpu"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        first = json.loads(process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]

    assert first["step"] == 1
    assert process.returncode == 130
    assert re.search(r"interrupted; step \d is saved, and the same command with --resume goes on", said)
    assert list((tmp_path / "run/checkpoints").glob("*.safetensors"))
    assert_same_run(uninterrupted, train(manifest, settings(), tmp_path / "run", resume=True, device="cpu"))


# The command, whose steps take as long as those of a larger model.
SLOWLY = """
import sys, time
from curation import cli
from curation.dinov2.objective import Inputs
inputs_of = Inputs.of
Inputs.of = lambda *arguments, **options: time.sleep(0.5) or inputs_of(*arguments, **options)
sys.exit(cli.main())
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_full_disk_is_one_clear_line_and_loses_nothing(
    manifest, settings, uninterrupted, tmp_path, monkeypatch, kind
):
    marker = tmp_path / "checkpoints" / ".step_00000006.json.writing"

    def no_space(*_, **__):  # in the words of safetensors on a file system that is full
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def fill_the_disk(report):
        if report.step == 6 and kind == "json":
            marker.symlink_to("/dev/full")
        elif report.step == 6:
            monkeypatch.setattr("curation.dinov2.checkpoint.save_file", no_space)

    with pytest.raises(DiskFullError, match=r"no space left for \S+; free some and run the command again .*--resume"):
        train(manifest, settings(), tmp_path, resume=False, device="cpu", on_step=fill_the_disk)
    monkeypatch.undo()
    assert not marker.is_symlink()
    assert load_file(tmp_path / "checkpoints/step_00000003.safetensors")
    assert_same_run(uninterrupted, train(manifest, settings(), tmp_path, resume=True, device="cpu"))


def test_the_loss_goes_down_and_the_teacher_does_not_collapse(manifest, settings, tmp_path):
    config = settings(schedule__steps=60, schedule__teacher_temp=[0.03, 0.03], data__batch_size=8)
    train(manifest, config, tmp_path, resume=False, device="cpu")
    log = lines(tmp_path)
    first, last = (np.mean([line["loss"] for line in part]) for part in (log[:10], log[-10:]))

    assert last < first - 0.1
    assert 0.1 * math.log(32) < log[-1]["teacher_entropy"] < 0.97 * math.log(32)


def test_scores_in_chunks_give_the_losses_of_all_at_once(manifest, settings, uninterrupted, tmp_path):
    train(manifest, settings(losses__chunk_rows=3), tmp_path, resume=False, device="cpu")

    assert_close_losses(tmp_path, uninterrupted)


def test_activation_checkpointing_changes_nothing(manifest, settings, uninterrupted, tmp_path):
    config = settings(activation_checkpointing=True)
    assert_same_run(uninterrupted, train(manifest, config, tmp_path, resume=False, device="cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_losses_of_others(manifest, settings, uninterrupted, tmp_path, recompute):
    config = settings(compile=True, activation_checkpointing=recompute)
    train(manifest, config, tmp_path, resume=False, device="cpu")

    assert_close_losses(tmp_path, uninterrupted)


def test_blocks_are_not_compiled_without_a_compiler(manifest, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(
        TrainError, match=r"needs a C\+\+ compiler, such as g\+\+; install one, or set compile to false"
    ):
        train(manifest, settings(compile=True), tmp_path / "run", resume=False, device="cpu")


def assert_close_losses(output, result):
    ours, theirs = lines(output), lines(result.log.parent)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in other:
            if name.startswith("loss"):
                assert one[name] == pytest.approx(other[name], abs=1e-5), name


def test_bfloat16_stays_near_float32(manifest, settings, uninterrupted, tmp_path):
    train(manifest, settings(precision="bfloat16"), tmp_path, resume=False, device="cpu")
    for one, other in zip(lines(tmp_path), lines(uninterrupted.log.parent), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_the_demo_settings_are_valid():
    config = load(TrainConfig, REPO / "configs/dinov2/tiny.yaml")

    assert config.schedule.teacher_temp[0] == config.schedule.teacher_temp[1]
