"""Training on one GPU: images a second, peak memory, share of the measured bfloat16 matrix peak; and the data path.

For ViT-S/16, B/16 and L/16 with two global and eight local crops a batch of 8-bit crops is coloured and trained on as
in a run, in bfloat16. FLOPs are counted by PyTorch on one step and not assumed. The data path is timed by itself with
all cores: the batches of a manifest that is written first. Without a GPU one line on standard error says so.

    python benchmarks/bench_train_gpu.py --record     # writes benchmarks/results/<date>-<device>.json
"""

import argparse
import datetime
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_train import photos
from torch.utils.flop_counter import FlopCounterMode

from curation import schema
from curation.dinov2 import colour
from curation.dinov2.centring import Centrings
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batch, Batches
from curation.dinov2.manifests import ManifestImages
from curation.dinov2.network import student_and_teacher, update_teacher
from curation.dinov2.objective import Inputs, objective, teacher_targets
from curation.dinov2.optim import Optimizer
from curation.dinov2.schedules import StepSettings

NOW = StepSettings(lr=1e-4, last_layer_lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.05)
BATCHES = {"small": 128, "base": 64, "large": 32}
PEAK_SHARE = {"large": 0.35}
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=2048, help="photos of the data path")
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
            figures += train_figures(arch, manifest, options.steps, peak)
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


def train_figures(arch: str, manifest: Path, num_steps: int, peak: float) -> list[dict[str, Any]]:
    config = settings(arch)
    data_rate, batch = data_path(manifest, config)
    step = Step(config, batch, torch.device("cuda"))
    with FlopCounterMode(display=False) as counter:
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step) for _ in range(WARM_UP + num_steps)][WARM_UP:]
    rate = config.data.batch_size / statistics.median(seconds)
    share = counter.get_total_flops() / statistics.median(seconds) / peak
    detail = {
        "batch": config.data.batch_size,
        "gflop_an_image": round(counter.get_total_flops() / config.data.batch_size / 1e9, 1),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "data_path_images_per_s": round(data_rate, 1),
        "data_path_cores": os.cpu_count(),
    }
    return [
        figure(f"{arch}_images_per_s", rate, "images/s", None, detail),
        figure(f"{arch}_share_of_bf16_peak", share, "share", PEAK_SHARE.get(arch), {}),
        figure(f"{arch}_data_path_over_step", data_rate / rate, "x", 1.0 if arch == "large" else None, {}),
    ]


def settings(arch: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "precision": "bfloat16",
            "model": {"arch": arch, "patch_px": 16},
            "crops": {"global_px": 224, "local_px": 96, "num_local": 8},
            "data": {"batch_size": BATCHES[arch], "workers": os.cpu_count(), "prefetch_batches": 4},
        }
    )


def data_path(manifest: Path, config: TrainConfig) -> tuple[float, Batch]:
    """Return the images a second that are decoded, cropped and put together, and a batch."""
    images = ManifestImages(str(manifest), config.data.max_image_bytes)
    num_steps = max(2, len(images) // config.data.batch_size)
    start = time.perf_counter()
    batches = [batch for (batch,) in Batches([images], config).between(0, num_steps)]
    return num_steps * config.data.batch_size / (time.perf_counter() - start), batches[-1]


class Step:
    """One training step from 8-bit crops in main memory."""

    def __init__(self, config: TrainConfig, batch: Batch, device: torch.device) -> None:
        self.config, self.batch, self.device = config, batch, device
        student, teacher = student_and_teacher(config)
        self.student, self.teacher = student.to(self.device), teacher.to(self.device)
        self.optimizer = Optimizer(self.student, config.optim)
        self.centrings = Centrings(config, self.device)

    def __call__(self) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        losses, crops = self.config.losses, self.config.crops
        views = [colour.augment(pixels.to(self.device), plan, crops) for pixels, plan in self.batch.crops]
        inputs = Inputs.of(views, self.batch.mask_NP, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            (targets,), _ = teacher_targets(self.teacher, [inputs], NOW.teacher_temp, losses, self.centrings)
            outcome = objective(inputs.ask(self.student, losses, None), inputs, targets, losses)
        outcome.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.clip()
        self.optimizer.step(NOW)
        update_teacher(self.student, self.teacher, NOW.momentum)


def write_manifest(folder: Path, files: list[bytes], num_images: int) -> Path:
    """Write photos into a tar, and a manifest that names each several times."""
    places = []
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for data in files:
            info = tarfile.TarInfo(f"{hashlib.sha256(data).hexdigest()[:32]}.jpg")
            info.size = len(data)
            places.append((info.name[:32], "0.tar", tar.offset + tarfile.BLOCKSIZE, len(data)))
            tar.addfile(info, io.BytesIO(data))
    rows = [places[index % len(places)] for index in range(num_images)]
    columns = dict(zip(("image_id", "tar", "tar_offset", "stored_bytes"), zip(*rows, strict=True), strict=True))
    arrays = [pa.array(columns.get(field.name, [None] * num_images), field.type) for field in schema.MANIFEST]
    pq.write_table(pa.table(arrays, schema=schema.MANIFEST), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def record(figures: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name()
    name = f"{datetime.datetime.now(datetime.UTC).date()}-{device.lower().replace(' ', '-')}.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"device": device, "torch": torch.__version__, "commit": commit, "figures": figures}))
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
