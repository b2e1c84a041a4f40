"""Training on one GPU: images a second, peak memory, share of the measured bfloat16 matrix peak; and the data path.

For ViT-S/16, B/16 and L/16 with two global and eight local crops a batch of 8-bit crops is coloured and trained on as
in a run, in bfloat16, with blocks as they are and compiled; where the device has too little memory, half a batch. FLOPs
are counted by PyTorch on one step and not assumed. The data path is timed by itself with all cores: the batches of a
manifest that is written first. Without a GPU one line on standard error says so.

    python benchmarks/bench_train_gpu.py --record     # writes benchmarks/results/<date>-<device>.json
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from photos import photos, write_manifest
from torch.utils.flop_counter import FlopCounterMode

from curation.dinov2.colour import ColourPlan
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batch, Batches
from curation.dinov2.learner import Learner
from curation.dinov2.manifests import ManifestImages
from curation.dinov2.schedules import StepSettings
from curation.errors import TrainError

NOW = StepSettings(lr=1e-4, last_layer_lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.05)
BATCHES = {"small": 256, "base": 128, "large": 64}
PEAK_SHARE = {"large": 0.35}
WARM_UP = 3
PREFETCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4096, help="photos of the data path")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled blocks: minutes each")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_train_gpu: skipped, there is no GPU", file=sys.stderr)
        return
    figures: list[dict[str, Any]] = []
    peak = matrix_peak()
    figures.append(figure("bf16_matrix_peak", peak / 1e12, "TFLOP/s", None, {}))
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), photos(256), options.images)
        for arch in options.archs:
            data_rate, batch = data_path(manifest, settings(arch, BATCHES[arch]))
            flops = flops_an_image(arch, first_images(batch, 16))
            for compiled in (False,) if options.no_compile else (False, True):
                figures += train_figures(arch, batch, options.steps, flops / peak, compiled=compiled)
            best = max(line["value"] for line in figures if line["metric"].startswith(f"{arch}_images_per_s"))
            detail = {"images_per_s": round(data_rate, 1), "cores": os.cpu_count()}
            target = 1.0 if arch == "large" else None
            figures.append(figure(f"{arch}_data_path_over_step", data_rate / best, "x", target, detail))
            if options.record:
                record(figures)


def figure(metric: str, value: float, unit: str, target: float | None, detail: dict[str, Any]) -> dict[str, Any]:
    line = {"bench": "train_gpu", "metric": metric, "value": round(value, 4), "unit": unit, "target": target}
    line |= {"met": None if target is None else value >= target, "detail": detail}
    print(json.dumps(line), flush=True)
    return line


def matrix_peak(side: int = 8192) -> float:
    """Return the FLOP/s of the best of some products of square bfloat16 matrices."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b) for _ in range(20))


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def train_figures(
    arch: str, batch: Batch, num_steps: int, share_an_image: float, *, compiled: bool
) -> list[dict[str, Any]]:
    """Measure steps on as much of a batch as the device has memory for; what cannot be compiled says why.

    Args:
        arch: The backbone.
        batch: 8-bit crops.
        num_steps: Steps to take the median of.
        share_an_image: Of the matrix peak, at one image a second.
        compiled: Whether blocks are compiled.
    """
    size = len(batch.images)
    while True:
        try:
            seconds, memory = median_step(arch, first_images(batch, size), num_steps, compiled=compiled)
            break
        except torch.OutOfMemoryError:
            size //= 2
            if not size:
                raise
        except (RuntimeError, TrainError) as error:
            if not compiled:
                raise
            print(f"bench_train_gpu: {arch} compiled: {error}", file=sys.stderr)
            return []
    rate, suffix = size / seconds, "_compiled" if compiled else ""
    detail = {"batch": size, "peak_memory_gb": round(memory / 1e9, 2)}
    return [
        figure(f"{arch}_images_per_s{suffix}", rate, "images/s", None, detail),
        figure(f"{arch}_share_of_bf16_peak{suffix}", rate * share_an_image, "share", PEAK_SHARE.get(arch), detail),
    ]


def median_step(arch: str, batch: Batch, num_steps: int, *, compiled: bool) -> tuple[float, int]:
    """Return the seconds of a step, and the most memory that one takes."""
    forget()
    step = step_on(settings(arch, len(batch.images), compiled=compiled), batch)
    for _ in range(WARM_UP):
        step()
    torch.cuda.reset_peak_memory_stats()
    return statistics.median(timed(step) for _ in range(num_steps)), torch.cuda.max_memory_allocated()


def forget() -> None:
    """Let go of what was trained and compiled before: code is compiled for eight kinds of input, and then no more."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def flops_an_image(arch: str, batch: Batch) -> float:
    step = step_on(settings(arch, len(batch.images)), batch)
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops()) / len(batch.images)


def step_on(config: TrainConfig, batch: Batch) -> Callable[[], object]:
    learner = Learner(config, torch.device("cuda"))
    learner.share(heads_alone=False, tensors={}, num_updates=0)
    return lambda: learner.step([batch], NOW)


def settings(arch: str, batch_size: int, *, compiled: bool = False) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "precision": "bfloat16",
            "compile": compiled,
            "model": {"arch": arch, "patch_px": 16},
            "crops": {"global_px": 224, "local_px": 96, "num_local": 8},
            "data": {"batch_size": batch_size, "workers": os.cpu_count(), "prefetch_batches": PREFETCH},
        }
    )


def data_path(manifest: Path, config: TrainConfig) -> tuple[float, Batch]:
    """Return the images a second that are decoded, cropped and put together, and a batch."""
    images = ManifestImages(str(manifest), config.data.max_image_bytes)
    num_steps = max(2 * PREFETCH, len(images) // config.data.batch_size)
    batches = Batches([images], config, device=torch.device("cuda")).between(0, num_steps)
    (batch,) = next(batches)  # processes are there now
    start = time.perf_counter()
    for (later,) in batches:
        batch = later
    made = num_steps - 1 - PREFETCH  # others may have been ready before
    return made * config.data.batch_size / (time.perf_counter() - start), batch


def first_images(batch: Batch, num_images: int) -> Batch:
    """Return a batch of the first images of another one."""
    total = len(batch.images)
    crops = [
        (
            stack.view(-1, total, *stack.shape[1:])[:, :num_images].flatten(0, 1),
            ColourPlan(
                **{
                    name: value.reshape(-1, total, *value.shape[1:])[:, :num_images].reshape(-1, *value.shape[1:])
                    for name, value in vars(plan).items()
                }
            ),
        )
        for stack, plan in batch.crops
    ]
    mask_NP = batch.mask_NP.view(-1, total, batch.mask_NP.shape[1])[:, :num_images].flatten(0, 1)
    return dataclasses.replace(batch, images=range(num_images), crops=crops, mask_NP=mask_NP)


def record(figures: list[dict[str, Any]]) -> None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True)
    commit = asked.stdout.strip() or None  # a copy without history has none
    device = torch.cuda.get_device_name()
    name = f"{datetime.datetime.now(datetime.UTC).date()}-{device.lower().replace(' ', '-')}.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"device": device, "torch": torch.__version__, "commit": commit, "figures": figures}))
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
