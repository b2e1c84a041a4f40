"""DINOv2 on CIFAR-10: k-NN of the trained backbone beside random weights and raw pixels.

The training images go through `curate run --stage fetch`, which checks them and packs them into tars; a manifest of
these is what `configs/dinov2/cifar10.yaml` trains on. The test images are seen by the evaluation only. On a GPU the
settings are those of the file; on a CPU a smaller model takes a few minutes, and does not pass raw pixels, or with
--long up to an hour, and does. Started again in the same folder, it goes on where it was stopped. JSON lines: one a
figure.
"""

import argparse
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import trainer_data as data

from curation.dinov2.config import TrainConfig
from curation.dinov2.device import device_of
from curation.dinov2.evaluate.backbones import load_backbone
from curation.dinov2.evaluate.config import EvaluateConfig
from curation.dinov2.evaluate.evaluation import Row, evaluate
from curation.dinov2.evaluate.tables import lines
from curation.dinov2.log import read
from curation.dinov2.train import train
from curation.settings import load, parse

SETTINGS = data.ROOT / "configs" / "dinov2" / "cifar10.yaml"
ON_CPU = (
    "precision=float32",
    "model={dim: 96, depth: 4, heads: 3, patch_px: 4, layer_scale: 1.0}",
    "crops.num_local=4",
    "heads.dino={prototypes: 512, layers: 2, hidden_dim: 256, bottleneck_dim: 48}",
    "heads.ibot={prototypes: 512, layers: 2, hidden_dim: 256, bottleneck_dim: 48}",
    "optim.base_lr=0.012",
    "schedule.steps=240",
    "schedule.warmup_steps=24",
    "schedule.freeze_last_layer_steps=0",
    "schedule.momentum=[0.97, 1.0]",
    "schedule.teacher_temp=[0.03, 0.03]",
    "schedule.teacher_temp_warmup_steps=0",
    "data={batch_size: 64, workers: 1}",
    "checkpoint.every_steps=40",
)
LONG_ON_CPU = (
    "schedule.steps=3600",
    "schedule.warmup_steps=300",
    "schedule.momentum=[0.99, 1.0]",
    "checkpoint.every_steps=200",
)
GPU_LIMIT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/cifar10", help="where everything goes (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--long", action="store_true", help="on a CPU: fifteen times as many steps, an hour or less")
    parser.add_argument("--train-images", type=int, help="images to train on; default: 50,000, on a CPU 10,000")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a training setting")
    options = parser.parse_args()
    folder, device = Path(options.folder), device_of(options.device)
    on_gpu = device.type == "cuda"
    limit = options.train_images or (50_000 if on_gpu or options.long else 10_000)
    manifest = manifest_of(folder, limit)
    labelled = {"path": str(data.DATA / "cifar10.parquet")}
    knn = {"data": labelled, "k": 20, "every_steps": 500 if on_gpu else 400 if options.long else 120, "crop_share": 1.0}
    on_cpu = () if on_gpu else (*ON_CPU, *(LONG_ON_CPU if options.long else ()))
    changes = [*on_cpu, f"monitors.knn={json.dumps(knn)}", *options.set]
    config = load(TrainConfig, SETTINGS, changes)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    result = train(
        manifest, config, folder / "train", resume=True, device=device.type, on_step=say, should_stop=stop.is_set
    )
    if not result.finished:
        raise SystemExit(f"stopped after step {result.steps}; the same command goes on")
    # Of all steps, whether or not the run was stopped between.
    seconds = sum(config.data.batch_size / line["images_per_s"] for line in read(result.log))
    rows = measured(folder, device)
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "train_images": limit,
        "steps": result.steps,
        "batch_size": config.data.batch_size,
        "train_s": round(seconds, 1),
    }
    trained, random, pixels = (row.knn[20] for row in rows)
    report("knn20_trained", trained, pixels, about)
    report("knn20_random_initialisation", random, None, about)
    report("knn20_raw_pixels", pixels, None, about)
    if on_gpu:
        report("train_s", seconds, GPU_LIMIT_S, about, "s", is_limit=True)


def manifest_of(folder: Path, limit: int) -> str:
    rows = data.rows_of("cifar10", "train", limit)
    source = data.write_rows(folder / "images.parquet", rows)
    inputs = [{"kind": "parquet", "path": str(source.resolve())}]
    context = data.curate(folder / "run", {"pool": {"inputs": inputs}}, "fetch", os.cpu_count() or 1)
    return data.write_manifest(folder / "run", "train", data.stored_rows(context, "fetch"))


def measured(folder: Path, device: torch.device) -> tuple[Row, ...]:
    limits = {} if device.type == "cuda" else {"max_train": 5_000, "max_test": 2_000}
    tree = {
        "data": {"path": str(data.DATA / "cifar10.parquet"), **limits},
        "crop_share": 1.0,
        "tasks": ["knn", "linear", "spectrum", "pictures"],
    }
    config = parse(EvaluateConfig, tree, "cifar10_run")
    trained, random = load_backbone(str(folder / "train"), device, config.seed)
    found = evaluate(trained, random, config, folder / "evaluation", device)
    print("\n".join(lines(found)), flush=True)
    return found.rows


def say(step: Any) -> None:
    for warning in step.warnings:
        print(warning, flush=True)
    if step.step % 50 == 0 or "knn_top1" in step.figures:
        print(
            json.dumps({"step": step.step, **{k: round(v, 4) for k, v in step.finite().items() if v is not None}}),
            flush=True,
        )


def report(
    metric: str, value: float, target: float | None, detail: Any, unit: str = "share", *, is_limit: bool = False
) -> None:
    met = None if target is None else (value <= target if is_limit else value > target)
    line = {"bench": "cifar10", "metric": metric, "value": round(value, 4), "unit": unit}
    line |= {"target": target if target is None else round(target, 4), "met": met, "detail": detail}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
