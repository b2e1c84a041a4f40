"""The trainer against a straightforward implementation of the published algorithm, on one core.

The other side, which this file contains, does what papers say and no more: the student's global and local crops in two
forwards, log-softmax and a product for every cross-entropy, and each sample augmented on its own on the CPU. Both sides
have the same ViT, heads, losses, masks and optimizer, and see the same photos. Sides alternate; a ratio is that of
medians. Peak memory is that of a process of its own for each side.

    step        one step of ViT-S/16, 2 x 224 + 8 x 96, batch 4, without reading data
    bfloat16    our step in bfloat16 against our own in float32
    data        decode, crops, and the operations that belong on a device, run on this same core
    data_cpu    the part that workers do: decode and crops
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from curation.config import ImagesConfig
from curation.dinov2 import colour, masks
from curation.dinov2.centring import Centrings
from curation.dinov2.config import TrainConfig
from curation.dinov2.crops import Views, multi_crop
from curation.dinov2.network import Network, student_and_teacher, update_teacher
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
TARGETS = {"step": 1.05, "bfloat16": 1.4, "data": 2.0, "data_cpu": 3.5, "memory": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=32, help="photos of the data path")
    parser.add_argument("--peak-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        step = Ours().step if options.peak_of == "ours" else Theirs().step
        for _ in range(2):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    ours, theirs, bfloat16 = Ours(), Theirs(), Ours(torch.bfloat16)
    seconds = alternated({"ours": ours.step, "theirs": theirs.step, "bfloat16": bfloat16.step}, options.rounds)
    report("step", "ratio_vs_straightforward", seconds["theirs"] / seconds["ours"], seconds)
    report("bfloat16", "ratio_vs_own_float32", seconds["ours"] / seconds["bfloat16"], seconds)
    files = photos(options.images)
    plans = {"ours": lambda: our_data(files), "theirs": lambda: their_data(files), "cpu": lambda: our_views(files)}
    seconds = alternated(plans, options.rounds)
    detail = {f"{name}_images_per_s": len(files) / taken for name, taken in seconds.items()}
    report("data", "ratio_vs_per_sample_augmentation", seconds["theirs"] / seconds["ours"], detail)
    report("data_cpu", "worker_part_ratio_vs_per_sample_augmentation", seconds["theirs"] / seconds["cpu"], detail)
    peaks = {side: peak_of(side) for side in ("ours", "theirs")}
    report("memory", "peak_of_the_straightforward_over_ours", peaks["theirs"] / peaks["ours"], peaks)


def report(key: str, metric: str, value: float, detail: dict[str, Any]) -> None:
    target = TARGETS[key]
    line = {"bench": "train", "metric": metric, "value": round(value, 3), "unit": "x", "target": target}
    line |= {"met": value >= target, "detail": {name: round(number, 3) for name, number in detail.items()}}
    print(json.dumps(line), flush=True)


def alternated(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each side after a round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if round_:
                taken[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in taken.items()}


def peak_of(side: str) -> int:
    command = [sys.executable, __file__, "--peak-of", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


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

    def step(self) -> None:
        """Take one step."""
        inputs = Inputs.of(self.views, self.mask)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            (targets,), _ = teacher_targets(self.teacher, [inputs], NOW.teacher_temp, CONFIG.losses, self.centrings)
            answers = inputs.ask(self.student, CONFIG.losses, None)
            outcome = objective(answers, inputs, targets, CONFIG.losses)
        self.optimizer.zero_grad()
        outcome.total.backward()
        self.optimizer.clip()
        self.optimizer.step(NOW)
        update_teacher(self.student, self.teacher, NOW.momentum)


class Theirs:
    """The published algorithm, written down as the papers have it."""

    def __init__(self) -> None:
        self.student, self.teacher = student_and_teacher(CONFIG)
        self.adamw = torch.optim.AdamW(self.student.parameters(), lr=NOW.lr, weight_decay=NOW.weight_decay)
        self.views, self.mask = batch()

    def step(self) -> None:
        """Take one step."""
        config, size = CONFIG.losses, CONFIG.data.batch_size
        whole, local = self.views
        masked = torch.nonzero(self.mask.flatten()).flatten()
        per_crop = self.mask.sum(1).clamp(min=1)
        weight = (1 / per_crop).unsqueeze(1).expand_as(self.mask).flatten()[masked]
        with torch.no_grad():
            features = self.teacher.backbone([whole])[0]
            class_targets = sinkhorn(self.teacher.dino_head(features.cls_ND).scores())
            patches = features.patches_NPD.flatten(0, 1)[masked]
            patch_targets = sinkhorn(self.teacher.ibot_head(patches).scores())
        seen = self.student.backbone([whole], [self.mask])[0]
        near = self.student.backbone([local])[0]
        scores, local_scores = (self.student.dino_head(part.cls_ND).scores() for part in (seen, near))
        loss = torch.zeros(())
        views = class_targets.chunk(2)
        for crop in local_scores.chunk(CONFIG.crops.num_local):
            for target in views:
                loss = loss + cross_entropy(target, crop).mean() / 18
        loss = loss + 2 * cross_entropy(torch.cat(views[::-1]), scores).mean() / 18
        patch_scores = self.student.ibot_head(seen.patches_NPD.flatten(0, 1)[masked]).scores()
        loss = loss + (cross_entropy(patch_targets, patch_scores) * weight).sum() / (2 * size)
        for crop in seen.cls_ND.chunk(2):
            unit = functional.normalize(crop, dim=-1)
            similarity = unit @ unit.T
            similarity.fill_diagonal_(-1)
            distance = functional.pairwise_distance(unit, unit[similarity.argmax(1)])
            loss = loss - config.koleo_weight * torch.log(distance + 1e-8).mean()
        self.adamw.zero_grad()
        loss.backward()
        for module in self.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), CONFIG.optim.clip_norm)
        self.adamw.step()
        ema(self.student, self.teacher)


def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    return -(target * functional.log_softmax(scores / CONFIG.losses.student_temp, dim=-1)).sum(-1)


@torch.no_grad()
def sinkhorn(scores: Tensor) -> Tensor:
    q = torch.exp(scores / NOW.teacher_temp).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


@torch.no_grad()
def ema(student: Network, teacher: Network) -> None:
    for theirs, ours in zip(student.parameters(), teacher.parameters(), strict=True):
        ours.mul_(NOW.momentum).add_(theirs, alpha=1 - NOW.momentum)


def photos(count: int) -> list[bytes]:
    """Return JPEGs with a shorter side of 256 pixels cut from photos that scikit-image ships."""
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    rng = np.random.default_rng(0)
    files = []
    for index in range(count):
        source = sources[index % len(sources)]
        top, left = (int(rng.integers(0, max(1, side - 256))) for side in source.shape[:2])
        image = Image.fromarray(source[top : top + 256, left : left + 342]).resize((342, 256))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def our_views(files: list[bytes]) -> list[Views]:
    limits = ImagesConfig()
    draws = [crops.draw(0, index, CONFIG.crops) for index in range(len(files))]
    return [multi_crop(decode(data, limits), numbers, CONFIG.crops) for data, numbers in zip(files, draws, strict=True)]


def our_data(files: list[bytes]) -> None:
    """Decode, crop, and colour in batches of the training run."""
    crops, size = CONFIG.crops, CONFIG.data.batch_size
    views = our_views(files)
    for first in range(0, len(files), size):
        part = views[first : first + size]
        draws = np.stack([colour.draw(0, first + index, 2 + crops.num_local) for index in range(len(part))], axis=1)
        for view in range(2):
            pixels = torch.from_numpy(np.stack([sample.global_V3HW[view] for sample in part]))
            colour.augment(pixels, colour.plan(draws[view], crops, crops.blur_p[view], 0.2 * view), crops)
        pixels = torch.from_numpy(np.concatenate([sample.local_V3HW for sample in part]))
        numbers = draws[2:].transpose(1, 0, 2).reshape(-1, colour.NUM_DRAWS)
        colour.augment(pixels, colour.plan(numbers, crops, crops.blur_p[2], 0.0), crops)


def their_data(files: list[bytes]) -> None:
    """Augment each sample on its own with Pillow, as the published code does with torchvision over Pillow."""
    crops = CONFIG.crops
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (crops.mean, crops.std))
    for index, data in enumerate(files):
        rng = np.random.default_rng(index)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for view in range(2 + crops.num_local):
            scale, side = (crops.global_scale, crops.global_px) if view < 2 else (crops.local_scale, crops.local_px)
            box = random_box(rng, image.size, scale, crops.aspect)
            crop = image.crop(box).resize((side, side), Image.Resampling.BICUBIC)
            crop = ImageOps.mirror(crop) if rng.random() < 0.5 else crop
            if rng.random() < crops.jitter_p:
                crop = jittered(crop, rng)
            if rng.random() < crops.grey_p:
                crop = crop.convert("L").convert("RGB")
            if rng.random() < crops.blur_p[min(view, 2)]:
                crop = blurred(crop, float(rng.uniform(*crops.blur_sigma_px)))
            if view == 1 and rng.random() < crops.solarise_p:
                crop = ImageOps.solarize(crop, 128)
            pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div(255)
            pixels.sub_(mean).div_(std)


def random_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    side = min(size)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


def jittered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    from PIL import ImageEnhance

    for operation in rng.permutation(4):
        if operation == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.asarray(hue, np.uint8) + np.uint8(int(rng.uniform(-0.1, 0.1) * 255) % 256)
            image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
            spread = (0.4, 0.4, 0.2)[operation]
            image = enhance(image).enhance(float(rng.uniform(1 - spread, 1 + spread)))
    return image


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with nine taps on a tensor, as torchvision does; Pillow's own box approximation is another filter."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    taps = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 9) * (kernel / kernel.sum()).view(9, 1)
    x = functional.pad(x.unsqueeze(0), (4, 4, 4, 4), mode="reflect")
    x = functional.conv2d(x, kernel.expand(3, 1, 9, 9), groups=3)[0]
    return Image.fromarray(x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
