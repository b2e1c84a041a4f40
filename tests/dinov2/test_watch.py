"""What is said while a run trains: monitors at their interval, a small k-NN, warnings in words, TensorBoard."""

import io
import json
import math
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.dinov2.alarms import LOOKS_IN_A_ROW, Alarms
from curation.dinov2.config import TrainConfig
from curation.dinov2.evaluate.backbones import VitBackbone
from curation.dinov2.evaluate.config import EvaluateConfig
from curation.dinov2.evaluate.evaluation import evaluate
from curation.dinov2.export import read_backbone
from curation.dinov2.train import train
from curation.dinov2.watch import SmallKnn
from curation.errors import InputError, TrainError

LOOKED_AT = {"rank", "alpha_req", "koleo_distance", "prototypes_used", "teacher_kl"}


def lines(output):
    with (output / "log.jsonl").open() as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Return the path of 30 images of two brightnesses to learn from, and 12 to test on."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(42):
        label = number % 2
        pixels = np.clip(rng.normal(60 + 120 * label, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue()}, "label": label, "split": "train" if number < 30 else "test"})
    path = tmp_path_factory.mktemp("labelled") / "set.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_monitors_look_at_their_interval_and_at_both_ends(manifest, settings, tmp_path):
    train(manifest, settings(monitors__every_steps=3), tmp_path, resume=False, device="cpu")

    log = lines(tmp_path)
    assert [line["step"] for line in log if line.keys() >= LOOKED_AT] == [1, 3, 6, 8]
    assert [line["step"] for line in log if LOOKED_AT & line.keys()] == [1, 3, 6, 8]
    assert all("teacher_entropy" in line for line in log)


def test_how_often_monitors_look_changes_no_weight(manifest, settings, labelled, tmp_path):
    knn = {"data": {"path": labelled}, "k": 5, "every_steps": 2}
    seen = train(
        manifest, settings(monitors={"every_steps": 1, "knn": knn}), tmp_path / "a", resume=False, device="cpu"
    )
    unseen = train(manifest, settings(monitors__every_steps=100), tmp_path / "b", resume=False, device="cpu")

    assert seen.checkpoint.read_bytes() == unseen.checkpoint.read_bytes()


def test_a_part_that_begins_to_learn_is_no_reason_for_a_warning(settings):
    alarms = Alarms(settings(schedule__warmup_steps=0))
    norms = [0.0] * 20 + [1.0] * 20
    said = [alarms.see(step, {"grad_norm_backbone": norm}) for step, norm in enumerate(norms, start=1)]

    assert not any(said)


def test_a_knn_of_features_that_are_not_finite_ends_no_run(settings, labelled):
    config = settings(monitors={"knn": {"data": {"path": labelled}, "k": 5}})
    figures = SmallKnn(config.monitors.knn, config, torch.device("cpu"))(lambda x: torch.full((len(x), 4), math.nan))

    assert math.isnan(figures["knn_top1"])
    assert figures["knn_top1_pixels"] > 0.9


def test_the_small_knn_is_no_part_of_the_pace_of_training(manifest, settings, labelled, tmp_path, monkeypatch):
    figures = SmallKnn.__call__
    monkeypatch.setattr(SmallKnn, "__call__", lambda self, encode: time.sleep(1) or figures(self, encode))
    knn = {"data": {"path": labelled}, "k": 5, "every_steps": 4}
    train(manifest, settings(schedule__steps=4, monitors={"knn": knn}), tmp_path, resume=False, device="cpu")

    assert lines(tmp_path)[-1]["images_per_s"] > 4 / 1  # four images, in less than the k-NN alone took


def test_the_small_knn_is_that_of_an_evaluation(manifest, settings, labelled, tmp_path):
    knn = {"data": {"path": labelled}, "k": 5, "every_steps": 3, "crop_share": 1.0}
    train(manifest, settings(monitors={"knn": knn}), tmp_path / "run", resume=False, device="cpu")

    found = {line["step"]: line["knn_top1"] for line in lines(tmp_path / "run") if "knn_top1" in line}
    assert found.keys() == {3, 6, 8}
    network, config, _ = read_backbone(tmp_path / "run")
    backbone = VitBackbone("teacher", network, (config.crops.mean, config.crops.std), torch.device("cpu"))
    tree = {"data": {"path": labelled}, "tasks": ["knn"], "knn": {"k": [5]}, "crop_share": 1.0}
    again = evaluate(
        backbone,
        backbone.at_random(0),
        EvaluateConfig.model_validate_json(json.dumps(tree)),
        tmp_path / "evaluation",
        torch.device("cpu"),
    )
    last = lines(tmp_path / "run")[-1]
    wanted = dict(zip(("knn_top1", "knn_top1_random", "knn_top1_pixels"), again.rows, strict=True))
    assert {name: last[name] for name in wanted} == {name: row.knn[5] for name, row in wanted.items()}
    assert found[8] > 0.6


@pytest.mark.parametrize(
    ("knn", "message"),
    [
        ({"k": 31}, r"holds 30 images to learn from, fewer than monitors\.knn\.k = 31"),
        ({"data": {"path": "nowhere.parquet"}}, "nowhere.parquet: does not exist"),
    ],
)
def test_a_labelled_set_that_cannot_be_used_stops_a_run_before_it_begins(
    manifest, settings, labelled, tmp_path, knn, message
):
    config = settings(monitors={"knn": {"data": {"path": labelled}, **knn}})

    with pytest.raises(InputError, match=message):
        train(manifest, config, tmp_path, resume=False, device="cpu", on_step=pytest.fail)


def test_a_collapse_is_warned_about_in_words(manifest, settings, tmp_path, caplog):
    # All crops of all images grey at one value: nothing can be told apart.
    config = settings(
        schedule={"steps": 10, "warmup_steps": 2, "freeze_last_layer_steps": 0, "teacher_temp_warmup_steps": 0},
        crops={"global_px": 32, "local_px": 16, "num_local": 1, "std": [1e6, 1e6, 1e6]},
        losses={"koleo_weight": 0},
        model={"dim": 24, "depth": 2, "heads": 2, "patch_px": 8, "layer_scale": 1e-5},
    )
    said = []
    train(manifest, config, tmp_path, resume=False, device="cpu", on_step=lambda report: said.extend(report.warnings))

    text = "\n".join(said)
    assert "step 5: features collapse: class tokens of different images lie" in text
    assert "features collapse: they use one direction (RankMe 1.0" in text
    assert "lower optim.base_lr" in text
    assert len(said) == len({warning.split(": ", 1)[1][:40] for warning in said})  # each once
    assert [warning for line in lines(tmp_path) for warning in line.get("warnings", [])] == said


def test_a_healthy_run_is_not_warned_about(manifest, settings, tmp_path):
    config = settings(schedule__steps=40, schedule__teacher_temp=[0.03, 0.03], data__batch_size=8)
    said = []
    train(manifest, config, tmp_path, resume=False, device="cpu", on_step=lambda report: said.extend(report.warnings))

    assert said == []


def test_a_resumed_run_warns_as_if_it_had_never_been_interrupted(manifest, settings, tmp_path):
    config = settings(
        model={"dim": 24, "depth": 2, "heads": 2, "patch_px": 8, "layer_scale": 1e-5},
        crops={"global_px": 32, "local_px": 16, "num_local": 1, "std": [1e6, 1e6, 1e6]},
        losses={"koleo_weight": 0},
    )
    train(manifest, config, tmp_path / "whole", resume=False, device="cpu")
    done = []
    train(manifest, config, tmp_path / "parts", resume=False, device="cpu", on_step=done.append,
          should_stop=lambda: len(done) == 4)  # fmt: skip
    train(manifest, config, tmp_path / "parts", resume=True, device="cpu")

    whole, parts = ([line.get("warnings", []) for line in lines(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    assert any(whole)


@pytest.fixture
def alarms():
    """Return alarms of a run of 64 prototypes and 16 images a step, 5 steps of warm-up."""
    tree = {
        "heads": {"dino": {"prototypes": 64}},
        "data": {"batch_size": 16},
        "schedule": {"steps": 100, "warmup_steps": 5},
    }
    return Alarms(TrainConfig.model_validate_json(json.dumps(tree)))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"koleo_distance": 0.001}, "lie 0.001 apart on the unit sphere"),
        ({"rank": 1.2}, "one direction (RankMe 1.20)"),
        ({"teacher_entropy": math.log(64)}, "entropy 4.16 of at most 4.16"),
        ({"prototypes_used": 1 / 32}, "choose the same prototype"),
    ],
)
def test_a_sign_is_said_when_it_stays_and_again_when_it_comes_back(alarms, bad, words):
    good = {"koleo_distance": 0.4, "rank": 9.0, "teacher_entropy": 2.0, "prototypes_used": 0.5}
    during_warmup = [alarms.see(step, good | bad) for step in range(1, 6)]
    looks = [bad] * (LOOKS_IN_A_ROW + 2) + [{}] + [bad] * LOOKS_IN_A_ROW
    said = [alarms.see(6 + number, good | look) for number, look in enumerate(looks)]

    assert not any(during_warmup)
    assert [number for number, warnings in enumerate(said) if warnings] == [2, 8]
    assert words in said[2][0]
    assert len(said[2]) == 1


def test_gradients_that_rise_by_orders_of_magnitude_are_said(alarms):
    said = [alarms.see(step, {"grad_norm_backbone": 0.5}) for step in range(6, 30)]
    said += [alarms.see(30 + number, {"grad_norm_backbone": 90.0, "rank": None}) for number in range(3)]

    assert [len(warnings) for warnings in said] == [0] * 26 + [1]
    assert "gradients of backbone are 90, 180 times the usual 0.5" in said[-1][0]


def test_tensorboard_reads_the_figures_of_the_log_after_a_resume_too(manifest, settings, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings(monitors={"every_steps": 1, "tensorboard": True})

    class DiedError(Exception):
        pass

    def die(report):
        if report.step == 5:
            raise DiedError

    with pytest.raises(DiedError):
        train(manifest, config, tmp_path, resume=False, device="cpu", on_step=die)
    train(manifest, config, tmp_path, resume=True, device="cpu")

    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    log = lines(tmp_path)
    for name, tag in (("loss", "loss/total"), ("loss_ibot", "loss/ibot"), ("rank", "run/rank"), ("lr", "run/lr")):
        events = found.Scalars(tag)
        assert [event.step for event in events] == list(range(1, 9))
        assert [event.value for event in events] == pytest.approx([line[name] for line in log], rel=1e-6)


def test_a_missing_tensorboard_is_said_before_a_run_begins(manifest, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)

    with pytest.raises(TrainError, match=r"needs the package tensorboard: pip install tensorboard"):
        train(manifest, settings(monitors__tensorboard=True), tmp_path, resume=False, device="cpu", on_step=pytest.fail)
