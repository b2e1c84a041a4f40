"""The trainer against a straightforward implementation of the published algorithm (``plain_dinov2.py``), on one core.

Both sides start from the same weights, see the same crops and masks, and must agree on the first loss. They alternate;
a ratio is that of medians of the processor's seconds, which what else the machine does disturbs less than the clock.
Peak memory is that of a process of its own for each side.

    step        one step of ViT-S/16, 2 x 224 + 8 x 96, batch 4, without reading data
    bfloat16    our step in bfloat16 against our own in float32
    data        decode, crops, and the operations that belong on a device, run on this same core
    data_cpu    the part that workers do: decode and crops
    workers     batches of images of 32 pixels made by two processes, against none, by the clock
    memory      peak resident memory after two steps in float32
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from photos import photos, write_manifest
from plain_dinov2 import PlainTrainer, augmented
from torch import Tensor

from curation.config.images import ImagesConfig
from curation.dinov2 import colour, crops, masks
from curation.dinov2.centring import Centrings
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batches
from curation.dinov2.manifests import ManifestImages
from curation.dinov2.network import student_and_teacher, update_teacher
from curation.dinov2.objective import Inputs, objective, teacher_targets
from curation.dinov2.optim import Optimizer
from curation.dinov2.schedules import StepSettings
from curation.images import decode

CONFIG = TrainConfig.model_validate(
    {
        "model": {"arch": "small", "patch_px": 16},
        "crops": {"global_px": 224, "local_px": 96, "num_local": 8},
        "heads": {"ibot": {}},
        "data": {"batch_size": 4},
    }
)
NOW = StepSettings(lr=1e-4, last_layer_lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.05)
SMALL = CONFIG.model_copy(
    update={
        "crops": CONFIG.crops.model_copy(update={"global_px": 32, "local_px": 16}),
        "model": CONFIG.model.model_copy(update={"patch_px": 4}),
    }
)
TARGETS = {"step": 1.05, "bfloat16": 1.4, "data": 2.0, "data_cpu": 3.5, "workers": 1.5, "memory": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="photos of the data path")
    parser.add_argument("--only", choices=["step", "data", "workers", "memory"], help="some of the figures")
    parser.add_argument("--peak-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        step = Ours().step if options.peak_of == "ours" else theirs().step
        for _ in range(2):
            step()
        print(peak_bytes())
        return
    parts: dict[str, Callable[[], None]] = {
        "step": lambda: steps(options.rounds),
        "data": lambda: data_path(options.rounds, options.images),
        "workers": lambda: data_workers(options.rounds),
        "memory": memory,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()


def steps(rounds: int) -> None:
    ours, plain, bfloat16 = Ours(), theirs(), Ours(torch.bfloat16)
    first = {"loss_ours": ours.step(), "loss_theirs": plain.step()}
    if abs(first["loss_ours"] - first["loss_theirs"]) > 1e-3:
        raise SystemExit(f"the sides compute different losses: {first}")
    seconds = alternated({"ours": ours.step, "theirs": plain.step, "bfloat16": bfloat16.step}, rounds)
    report("step", "ratio_vs_straightforward", seconds["theirs"] / seconds["ours"], seconds | first)
    report("bfloat16", "ratio_vs_own_float32", seconds["ours"] / seconds["bfloat16"], seconds)


def data_path(rounds: int, num_images: int) -> None:
    files = photos(num_images)
    plans = {"ours": lambda: our_data(files), "theirs": lambda: their_data(files), "cpu": lambda: our_views(files)}
    seconds = alternated(plans, rounds)
    detail = {f"{name}_images_per_s": len(files) / taken for name, taken in seconds.items()}
    report("data", "ratio_vs_per_sample_augmentation", seconds["theirs"] / seconds["ours"], detail)
    report("data_cpu", "worker_part_ratio_vs_per_sample_augmentation", seconds["theirs"] / seconds["cpu"], detail)


def data_workers(rounds: int, num_images: int = 4096, batch_size: int = 256) -> None:
    """Make batches in this process and in two others, alternately."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = ManifestImages(str(write_manifest(Path(folder), photos(64, side_px=32), num_images)), 1 << 20)
        seconds: dict[str, list[float]] = {"none": [], "two": []}
        for _ in range(rounds):
            for name, number in (("none", 0), ("two", 2)):
                data = CONFIG.data.model_copy(update={"batch_size": batch_size, "workers": number})
                steps = Batches([manifest], SMALL.model_copy(update={"data": data})).between(
                    0, num_images // batch_size
                )
                next(steps)  # processes are there now
                start = time.perf_counter()
                for _ in steps:
                    pass
                seconds[name].append(time.perf_counter() - start)
    taken = {name: median(values) for name, values in seconds.items()}
    detail = {f"{name}_images_per_s": (num_images - batch_size) / value for name, value in taken.items()}
    report("workers", "two_processes_over_none", taken["none"] / taken["two"], detail)


def memory() -> None:
    peaks = {side: float(peak_of(side)) for side in ("ours", "theirs")}
    report("memory", "peak_of_the_straightforward_over_ours", peaks["theirs"] / peaks["ours"], peaks)


def report(key: str, metric: str, value: float, detail: dict[str, float]) -> None:
    target = TARGETS[key]
    line: dict[str, Any] = {"bench": "train", "metric": metric, "value": round(value, 3), "unit": "x", "target": target}
    line |= {"met": value >= target, "detail": {name: round(number, 3) for name, number in detail.items()}}
    print(json.dumps(line), flush=True)


def alternated(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of the processor of each side after a round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            start = time.process_time()
            run()
            if round_:
                taken[name].append(time.process_time() - start)
    return {name: median(values) for name, values in taken.items()}


def peak_of(side: str) -> int:
    command = [sys.executable, __file__, "--peak-of", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_bytes() -> int:
    """Return the most memory that this process has held; the kernel's other figure begins with that of its parent."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def batch() -> tuple[list[Tensor], Tensor]:
    """Return normalised noise as crops, and masks."""
    crops, size = CONFIG.crops, CONFIG.data.batch_size
    rng = torch.Generator().manual_seed(0)
    views = [torch.randn(2 * size, 3, crops.global_px, crops.global_px, generator=rng)]
    views.append(torch.randn(crops.num_local * size, 3, crops.local_px, crops.local_px, generator=rng))
    side = crops.global_px // CONFIG.model.patch_px
    return views, torch.from_numpy(masks.batch_masks(0, 0, size, (side, side), CONFIG.losses))


class Ours:
    """The trainer's own step."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.student, self.teacher = student_and_teacher(CONFIG)
        self.optimizer = Optimizer(self.student, CONFIG.optim)
        self.centrings = Centrings(CONFIG, torch.device("cpu"))
        self.dtype = dtype
        self.views, self.mask = batch()

    def step(self) -> float:
        """Take one step; return its loss."""
        self.optimizer.zero_grad()
        inputs = Inputs.of(self.views, self.mask)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            (targets,), _ = teacher_targets(self.teacher, [inputs], NOW.teacher_temp, CONFIG.losses, self.centrings)
            outcome = objective(inputs.ask(self.student, CONFIG.losses, None), inputs, targets, CONFIG.losses)
        outcome.total.backward()
        self.optimizer.clip()
        self.optimizer.step(NOW)
        update_teacher(self.student, self.teacher, NOW.momentum)
        return outcome.total.item()


def theirs() -> PlainTrainer:
    return PlainTrainer(CONFIG, student_and_teacher(CONFIG)[0].state_dict(), *batch(), NOW)


def our_views(files: list[bytes]) -> list[crops.Views]:
    limits = ImagesConfig()
    draws = [crops.draw(0, index, CONFIG.crops) for index in range(len(files))]
    return [
        crops.multi_crop(decode(data, limits), numbers, CONFIG.crops)
        for data, numbers in zip(files, draws, strict=True)
    ]


def our_data(files: list[bytes]) -> None:
    """Decode, crop, and colour in batches of the training run."""
    config, size = CONFIG.crops, CONFIG.data.batch_size
    num_views = 2 + config.num_local
    views = our_views(files)
    for first in range(0, len(files), size):
        part = views[first : first + size]
        draws = np.stack([colour.draw(0, first + index, num_views) for index in range(len(part))], axis=1)
        plans = [
            colour.plan(draws[view], config, config.blur_p[min(view, 2)], config.solarise_p * (view == 1))
            for view in range(num_views)
        ]
        whole = np.concatenate(np.stack([sample.global_V3HW for sample in part], axis=1))
        local = np.concatenate(np.stack([sample.local_V3HW for sample in part], axis=1))
        colour.augment(torch.from_numpy(whole), colour.ColourPlan.joined(plans[:2]), config)
        colour.augment(torch.from_numpy(local), colour.ColourPlan.joined(plans[2:]), config)


def their_data(files: list[bytes]) -> None:
    """Augment each sample on its own, then stack the crops of each batch."""
    size = CONFIG.data.batch_size
    for first in range(0, len(files), size):
        samples = [
            augmented(data, first + index, CONFIG.crops) for index, data in enumerate(files[first : first + size])
        ]
        for views in zip(*samples, strict=True):
            torch.stack(views)


if __name__ == "__main__":
    main()
