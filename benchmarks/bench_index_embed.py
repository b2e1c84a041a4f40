"""Embedding throughput against a plain timm + DataLoader loop: same files, same network, same batch, all cores.

Ours is two workers, as ``curate run`` has on two cores, each on one thread of torch with ``images.decode_threads``
more for decoding. What is timed is the pass over a shard's images as ``pipelines/image_pass.py`` does it: every file's
sha256, the scan of its structure, the limits, decoding at a reduced scale, the model's preparation, the batches.
Theirs is timm's own transform in a DataLoader, full decode, with the quickest of a few numbers of workers and threads,
found beforehand.

Files: the photos of ``photos.parquet`` (short side 256), and 12-megapixel JPEGs made like those of
``bench_images_decode.py``. Sides take turns; a ratio is that of medians over ``--rounds``. Processes live through all
rounds and have seen a batch before the clock starts. ``--clock cpu`` compares the CPU time of all processes of a side
instead, for machines where others are at work; it takes theirs to keep both cores busy.

Where there is a GPU: images/s of ViT-H/16 at 224 with random weights, and the share of the bf16 matrix product's speed
measured beside it.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from curation.config import RunConfig
from curation.config.selection import EmbedConfig

BATCH = 16
LOADERS = [(0, 2), (1, 2), (2, 1), (2, 2)]  # workers of the DataLoader, threads of torch
TARGETS = {"12mpx": 1.3, "photos": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--large", type=int, default=48, help="12-megapixel files")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--loader", default="", help="workers,threads of the plain loop, instead of finding the best")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, files in (
            ("12mpx", large(Path(folder), options.large)),
            ("photos", photos(Path(folder), options.photos)),
        ):
            if files:
                cpu(name, files, options)
    import torch

    if torch.cuda.is_available():
        gpu("cuda", "vit_huge_patch16_gap_448.in1k_ijepa", 224, 256)


# -- files ----------------------------------------------------------------------------------------------------------


def photos(folder: Path, number: int) -> list[Path]:
    """Write photos of the shared data; none where there are none."""
    import pyarrow.parquet as pq

    shared = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = shared / "photos.parquet"
    if not path.is_file():
        return []
    images = pq.read_table(path, columns=["image"]).column("image").slice(0, number).to_pylist()
    return written(folder / "photos", (image["bytes"] for image in images))


def large(folder: Path, number: int) -> list[Path]:
    """Write 12-megapixel JPEGs, different ones in turn."""
    import numpy as np
    from bench_images_decode import enlarged
    from bench_images_decode import photos as sources

    rng = np.random.default_rng(0)
    different = [enlarged(photo, 2.0, rng) for _, photo in list(sources())[: min(8, number)]]
    return written(folder / "large", (different[index % len(different)] for index in range(number)))


def written(folder: Path, contents: Iterator[bytes]) -> list[Path]:
    folder.mkdir()
    paths = []
    for index, content in enumerate(contents):
        paths.append(folder / f"{index:05d}.jpg")
        paths[-1].write_bytes(content)
    return paths


# -- two cores ------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that do a share of the files each time they are told to."""

    def __init__(self, target: Callable[..., None], shares: Sequence[Any]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for share in shares:
            ours, theirs = spawn.Pipe()
            self._processes.append(spawn.Process(target=target, args=(theirs, share)))
            self._processes[-1].start()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()  # ready

    def __call__(self) -> dict[str, float]:
        """Return the seconds until all are done, and those of CPU time that they took."""
        start = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(True)
        busy = sum(pipe.recv() for pipe in self._pipes)
        return {"wall": time.perf_counter() - start, "cpu": busy}

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(False)
            process.join()


def cpu(name: str, files: list[Path], options: argparse.Namespace) -> None:
    """Report the ratio on one set of files."""
    best = tuple(map(int, options.loader.split(","))) if options.loader else best_loader(files, options.clock)
    sides = {"plain": Workers(theirs, [(files, *best)]), "curation": Workers(ours, [files[0::2], files[1::2]])}
    seconds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, workers in sides.items():
            seconds[side].append(workers())
    for workers in sides.values():
        workers.close()
    rates = {
        clock: {side: len(files) / median(one[clock] for one in rounds) for side, rounds in seconds.items()}
        for clock in ("wall", "cpu")
    }
    chosen = rates[options.clock]
    detail = {
        "clock": options.clock,
        "images_per_s": {clock: {side: round(rate, 1) for side, rate in by.items()} for clock, by in rates.items()},
        "files": len(files),
        "megabytes": round(sum(path.stat().st_size for path in files) / len(files) / 1e6, 3),
        "plain_loader": {"num_workers": best[0], "torch_threads": best[1]},
        "rounds": options.rounds,
        "cores": os.cpu_count(),
    }
    report(f"ratio_vs_timm_loop_{name}", chosen["curation"] / chosen["plain"], "x", TARGETS[name], detail)


def best_loader(files: list[Path], clock: str) -> tuple[int, ...]:
    """Return the workers and threads with which the plain loop is quickest."""
    pilot: dict[tuple[int, ...], float] = {}
    for loader in LOADERS:
        workers = Workers(theirs, [(files[: max(BATCH, len(files) // 4)], *loader)])
        pilot[loader] = workers()[clock]
        workers.close()
    return min(pilot, key=pilot.__getitem__)


def theirs(pipe: Connection, share: tuple[list[Path], int, int]) -> None:
    """A plain loop over a DataLoader."""
    files, num_workers, num_threads = share
    import torch
    from PIL import Image

    from curation.models import networks
    from curation.models.weights import resolve

    torch.set_num_threads(num_threads)
    config = EmbedConfig(batch_size=BATCH)
    network = networks.load(config, resolve(config.weights))
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(network), is_training=False)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Any:
            return transform(Image.open(files[index]).convert("RGB"))

    loader = torch.utils.data.DataLoader(
        Files(),
        BATCH,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers else None,
    )

    def once(limit: int | None = None) -> None:
        with torch.inference_mode():
            for index, batch in enumerate(loader):
                network(batch)
                if index + 1 == limit:
                    break

    once(2)
    pipe.send("ready")
    while pipe.recv():
        before = cpu_seconds()
        once()
        pipe.send(cpu_seconds() - before)


def ours(pipe: Connection, files: list[Path]) -> None:
    """One worker: the pass of the pipeline over its files."""
    import hashlib

    import pyarrow as pa

    from curation.models.encoder import ImageEncoder
    from curation.models.weights import resolve
    from curation.pipelines import image_pass
    from curation.pipelines.context import Context
    from curation.pipelines.ingest import image_id
    from curation.pipelines.lvd142m import build_plan
    from curation.stages.embed import EmbedStage
    from curation.store import Run

    config = RunConfig(embed=EmbedConfig(batch_size=BATCH))
    stage = EmbedStage(ImageEncoder(config.embed, resolve(config.embed.weights)), config.embed)
    step = build_plan(config).step("embed")
    ids = [hashlib.sha256(path.read_bytes()).hexdigest()[:32] for path in files]

    def source(number: int) -> Iterator[tuple[int, bytes]]:
        for row in range(number):
            data = files[row].read_bytes()
            if image_id(data) != ids[row]:
                raise AssertionError(files[row])
            yield row, data

    def once(number: int) -> None:
        part = image_pass._Part(step, stage, frozenset(range(number)), stage.writes.schema.empty_table())
        context = Context(Run(tempfile.gettempdir()), config)
        image_pass._compute(context, "pool", 0, [part], source(number), pa.chunked_array([ids]))
        if sum(table.num_rows for table in part.tables) != number:
            raise AssertionError("rows are missing")

    once(min(2 * BATCH, len(files)))
    pipe.send("ready")
    while pipe.recv():
        before = cpu_seconds()
        once(len(files))
        pipe.send(cpu_seconds() - before)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that live."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


# -- GPU ------------------------------------------------------------------------------------------------------------


def gpu(device: str, model: str, side_px: int, batch_size: int) -> None:
    """Report images/s, from prepared pixels to features in memory, and their share of the matrix product's peak."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from torch.utils.flop_counter import FlopCounterMode

    from curation.models import torchvision_shim
    from curation.models.encoder import ImageEncoder
    from curation.models.weights import resolve

    torchvision_shim.prepare()
    import timm

    peak = matmul_flops_per_s(device)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    rng = np.random.default_rng(0)
    batch = [rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8) for _ in range(batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        torch.manual_seed(0)
        save_file(timm.create_model(model, num_classes=0).state_dict(), path)
        for compiled in (False, True):
            config = EmbedConfig(
                model=model,
                side_px=side_px,
                batch_size=batch_size,
                precision="bf16",
                features="pooled",
                compile=compiled,
            )
            encoder = ImageEncoder(config, resolve(str(path)), device=device)
            if not compiled:
                with FlopCounterMode(display=False) as counter:
                    encoder(batch)
                flops = counter.get_total_flops() / batch_size
            seconds = []
            for _ in range(12):
                start = time.perf_counter()
                encoder(batch)
                seconds.append(time.perf_counter() - start)
            rate = batch_size / median(seconds[2:])
            detail = {"device": name, "model": model, "side_px": side_px, "batch_size": batch_size, "precision": "bf16"}
            detail |= {"gflops_per_image": round(flops / 1e9, 1), "matmul_tflops_per_s": round(peak / 1e12, 1)}
            suffix = "_compiled" if compiled else ""
            report(f"gpu_images_per_s{suffix}", rate, "1/s", None, detail)
            report(f"gpu_share_of_matmul_peak{suffix}", rate * flops / peak, "share", 0.5, detail)


def matmul_flops_per_s(device: str, side: int = 8192) -> float:
    """Return the speed of a bf16 product of two large square matrices, the best of several."""
    import torch

    side = side if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * side**3 / best


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def report(metric: str, value: float, unit: str, target: float | None, detail: dict[str, Any]) -> None:
    line = {"bench": "index_embed", "metric": metric, "value": round(value, 4), "unit": unit}
    if target is not None:
        line |= {"target": target, "met": value >= target}
    print(json.dumps(line | {"detail": detail}), flush=True)


if __name__ == "__main__":
    main()
