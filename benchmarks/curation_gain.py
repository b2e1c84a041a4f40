"""What curation is worth: the same training on curated and on uncurated images, as many of them, seen as often.

The pool is CIFAR-10 with a long tail of classes, near-duplicates of popular images, and junk of other domains (Tiny
ImageNet, plain pictures, noise). This project's own pipeline curates it towards a small seed set. Then DINOv2 is
trained on n images, for the same number of steps, of each of

    random           drawn from the pool as it is
    curated          drawn from the pipeline's manifest
    shuffled         a control: drawn from what deduplication left, as many from each cluster as `curated` has, with the
                     images' clusters shuffled; what is left of the gain is not owed to clusters
    clean_balanced   an oracle: distinct images of CIFAR-10, as many of each class

and measured by k-NN and a linear probe on images that are in none of them. Seeds change draws, weights and crops.
On a GPU the protocol is run in full; without one, at a size that shows that it runs and proves nothing. Started again
in the same folder, it goes on where it was stopped.
"""

import argparse
import io
import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import trainer_data as data
from PIL import Image

from curation.config.images import ImagesConfig
from curation.dinov2.config import TrainConfig
from curation.dinov2.device import device_of
from curation.dinov2.evaluate.backbones import Backbone, PixelBackbone, load_backbone
from curation.dinov2.evaluate.config import LabelledConfig, LinearConfig
from curation.dinov2.evaluate.features import View, extract
from curation.dinov2.evaluate.knn import knn_accuracy
from curation.dinov2.evaluate.labelled import open_labelled
from curation.dinov2.evaluate.linear import probe
from curation.dinov2.train import train
from curation.pipelines.context import Context
from curation.pipelines.publish import publish
from curation.settings import load

SETTINGS = data.ROOT / "configs" / "dinov2" / "cifar10.yaml"
ARMS = ("random", "curated", "shuffled", "clean_balanced")
SEEDS = (0, 1, 2)
NUM_CLASSES = 10
SIDE_PX = 32
NEIGHBOURS = 20


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        largest: Images of the commonest class; each class has `tail` of the one before.
        tail: See `largest`.
        copies: Near-duplicates, of images drawn by Zipf's law.
        junk: Images of other domains.
        seeds: Images of the seed set, as many of each class.
        clusters: Of k-means.
        per_cluster: Images retrieved from a cluster that holds more than one seed image.
        arm: Images of an arm, or as many as were retrieved.
        probe_train: Labelled images to learn from.
        probe_test: Labelled images to test on.
        training: Changes of `configs/dinov2/cifar10.yaml`.
    """

    largest: int
    tail: float
    copies: int
    junk: int
    seeds: int
    clusters: int
    per_cluster: int
    arm: int
    probe_train: int
    probe_test: int
    training: tuple[str, ...]


FULL = Size(
    largest=4_000, tail=0.65, copies=8_000, junk=9_000, seeds=1_000, clusters=400, per_cluster=60, arm=5_000,
    probe_train=10_000, probe_test=10_000,
    training=("schedule.steps=1000", "schedule.warmup_steps=100", "data.batch_size=256"),
)  # fmt: skip
SMOKE = Size(
    largest=60, tail=0.7, copies=80, junk=100, seeds=60, clusters=30, per_cluster=8, arm=96,
    probe_train=500, probe_test=500,
    training=(
        "precision=float32",
        "model={dim: 48, depth: 2, heads: 2, patch_px: 4, layer_scale: 1.0}",
        "crops.num_local=2",
        "heads.dino={prototypes: 128, layers: 2, hidden_dim: 96, bottleneck_dim: 24}",
        "heads.ibot={prototypes: 128, layers: 2, hidden_dim: 96, bottleneck_dim: 24}",
        "optim.base_lr=0.01",
        "schedule.steps=20",
        "schedule.warmup_steps=4",
        "schedule.freeze_last_layer_steps=0",
        "schedule.teacher_temp_warmup_steps=0",
        "data={batch_size: 24, workers: 0}",
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/curation_gain", help="where everything goes (default: %(default)s)")
    parser.add_argument("--size", choices=("full", "smoke"), help="default: full with a GPU, else smoke")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the pipeline")
    options = parser.parse_args()
    device, folder = device_of(options.device), Path(options.folder)
    name = options.size or ("full" if device.type == "cuda" else "smoke")
    size = FULL if name == "full" else SMOKE
    if name == "smoke":
        print("smoke size: this shows that the protocol runs, and proves nothing about curation", flush=True)
    kinds = build(folder, size)
    context = data.curate(folder / "run", settings(folder, size), "manifest", options.workers)
    publish(context)
    arms = draws(context, folder, size, kinds, options.workers)
    num = len(arms[ARMS[0]][0])
    found: dict[str, list[dict[str, float]]] = {}
    for arm in ARMS:
        found[arm] = []
        for seed in SEEDS:
            backbone = trained(folder, context, size, arm, seed, arms[arm][seed], device)
            found[arm].append(measured(backbone, folder, device))
    beside(folder, device)
    for arm in ARMS:
        detail = {"images": num, "what": composition(arms[arm][0], kinds), **asdict(size)}
        for metric in ("knn", "linear"):
            report(name, f"{metric}_{arm}", [values[metric] for values in found[arm]], detail)
    for arm in ARMS[1:]:
        for metric in ("knn", "linear"):
            gains = [ours[metric] - theirs[metric] for ours, theirs in zip(found[arm], found["random"], strict=True)]
            report(name, f"{metric}_gain_of_{arm}", gains, {}, target=0.0 if arm == "curated" else None)


def build(folder: Path, size: Size) -> list[str]:
    """Write pool, seeds, clean images and labelled images, no image in two of them; return what each pool row is."""
    truth = folder / "pool.json"
    if truth.exists():  # a run that goes on
        kinds: list[str] = json.loads(truth.read_text())
        return kinds
    rng = np.random.default_rng(0)
    by_class: dict[str, list[data.Row]] = {}
    for row in data.rows_of("cifar10", "train"):
        by_class.setdefault(row["label"], []).append(row)
    classes = sorted(by_class)
    for rows in by_class.values():
        rng.shuffle(rows)  # type: ignore[arg-type]

    def take(name: str, count: int) -> list[data.Row]:
        taken, by_class[name] = by_class[name][:count], by_class[name][count:]
        return taken

    originals = [row for rank, name in enumerate(classes) for row in take(name, round(size.largest * size.tail**rank))]
    clean = [row for name in classes for row in take(name, size.arm // NUM_CLASSES)]
    seeds = [row for name in classes for row in take(name, size.seeds // NUM_CLASSES)]
    probe_train = [row for name in classes for row in take(name, size.probe_train // NUM_CLASSES)]
    probe_test = data.rows_of("cifar10", "test", size.probe_test)
    popular = rng.permutation(len(originals))[np.minimum(rng.zipf(1.3, size.copies) - 1, len(originals) - 1)]
    pool = [(row, f"original {row['label']}") for row in originals]
    pool += [(copied(originals[index], rng), f"copy {originals[index]['label']}") for index in popular]
    pool += [(row, "junk") for row in junk(size.junk, rng)]
    order = rng.permutation(len(pool))
    data.write_rows(folder / "pool.parquet", [{"image": pool[index][0]["image"]} for index in order])
    for name, rows in (("seeds", seeds), ("clean", clean)):
        data.write_rows(folder / f"{name}.parquet", [{"image": row["image"]} for row in rows])
    labelled = [
        {**row, "split": split} for split, part in (("train", probe_train), ("test", probe_test)) for row in part
    ]
    data.write_rows(folder / "labelled.parquet", labelled)
    kinds = [pool[index][1] for index in order]
    truth.write_text(json.dumps(kinds))
    return kinds


def copied(row: data.Row, rng: np.random.Generator) -> data.Row:
    """Return a near-duplicate: a pixel or two cut off, enlarged again, brightness changed, saved as JPEG."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    left, top = (int(value) for value in rng.integers(0, 3, 2))
    image = image.crop((left, top, image.width - 1, image.height - 1)).resize(image.size, Image.Resampling.BICUBIC)
    pixels = (np.asarray(image) * rng.uniform(0.85, 1.15)).clip(0, 255).astype(np.uint8)
    return {"image": encoded(pixels, "JPEG", quality=int(rng.integers(70, 96)))}


def junk(count: int, rng: np.random.Generator) -> Iterator[data.Row]:
    """Yield half photos of other subjects, half flat colours, gradients and noise."""
    for row in data.rows_of("tiny_imagenet", limit=count // 2):
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        yield {"image": encoded(np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)))}
    for number in range(count - count // 2):
        base = rng.uniform(0, 255, (1, 1, 3))
        ramp = np.linspace(-1, 1, SIDE_PX).reshape((1, -1, 1) if number % 2 else (-1, 1, 1))
        spread = (0, 60, 0, 60)[number % 4] * ramp + rng.normal(0, (2, 2, 50, 25)[number % 4], (SIDE_PX, SIDE_PX, 3))
        yield {"image": encoded((base + spread).clip(0, 255).astype(np.uint8))}


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def settings(folder: Path, size: Size) -> dict[str, Any]:
    """Return a run of all stages: clean, deduplicate, embed, cluster, and take what lies near the seeds."""

    def parquet(name: str) -> list[dict[str, str]]:
        return [{"kind": "parquet", "path": str((folder / f"{name}.parquet").resolve())}]

    seeds = {"retrieve": "cluster", "as_is": False, "min_seed_images": 1, "images_per_cluster": size.per_cluster}
    return {
        "pool": {"inputs": parquet("pool")},
        "seeds": {"cifar10": {"inputs": parquet("seeds"), **seeds}},
        "shards": {"rows": 2_000},
        "pca_hash": {"sample_size": 2_000},
        "cluster": {"num_clusters": size.clusters},
    }


def draws(
    context: Context, folder: Path, size: Size, kinds: list[str], workers: int
) -> dict[str, dict[int, list[data.Row]]]:
    """Return the images of each arm for each seed; all arms have as many."""
    stored = data.stored_rows(context, "faces")
    cluster = clusters(context)
    manifest = pq.read_table(folder / "run" / "manifest.parquet", columns=["image_id", "collection"])
    chosen = {row["image_id"] for row in manifest.to_pylist() if row["collection"] == "pool"}
    curated = [row for row in stored if row["number"] in cluster and row["image_id"] in chosen]
    curated = list({row["image_id"]: row for row in curated}.values())
    left = [row for row in stored if row["number"] in cluster]
    clean_run = data.curate(
        folder / "clean",
        {"pool": {"inputs": [{"kind": "parquet", "path": str((folder / "clean.parquet").resolve())}]}},
        "fetch",
        workers,
    )
    clean = [{**row, "number": None} for row in data.stored_rows(clean_run, "fetch")]
    num = min(size.arm, len(curated), len(clean))
    batch = load(TrainConfig, SETTINGS, size.training).data.batch_size
    print(
        json.dumps(
            {"pool": len(kinds), "kinds": summary(kinds), "left_by_dedup": len(left), "retrieved": len(curated)}
        ),
        flush=True,
    )
    if num < batch:
        raise SystemExit(f"only {num} images were retrieved, fewer than a batch of {batch}; nothing can be compared")
    arms: dict[str, dict[int, list[data.Row]]] = {arm: {} for arm in ARMS}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        arms["random"][seed] = drawn(stored, num, rng)
        arms["curated"][seed] = drawn(curated, num, rng)
        arms["shuffled"][seed] = shuffled(left, cluster, arms["curated"][seed], rng)
        arms["clean_balanced"][seed] = drawn(clean, num, rng)
    return arms


def clusters(context: Context) -> dict[int, int]:
    """Return the cluster of each pool row that deduplication left, by its number in the Parquet file."""
    found = {}
    for shard in context.run.markers("pool", "cluster"):
        urls = context.run.read_table("pool", "crawl", shard, ["url"]).column(0).to_pylist()
        ids = context.run.read_table("pool", "cluster", shard, ["cluster_id"]).column(0).to_pylist()
        found |= {int(url.rpartition("#")[2]): value for url, value in zip(urls, ids, strict=True) if value is not None}
    return found


def drawn(rows: list[data.Row], num: int, rng: np.random.Generator) -> list[data.Row]:
    return [rows[index] for index in np.sort(rng.permutation(len(rows))[:num])]


def shuffled(
    left: list[data.Row], cluster: dict[int, int], curated: list[data.Row], rng: np.random.Generator
) -> list[data.Row]:
    """Return as many rows of each cluster as the curated arm has, after the clusters were dealt out anew."""
    dealt = rng.permutation([cluster[row["number"]] for row in left])
    wanted = Counter(cluster[row["number"]] for row in curated)
    rows: list[data.Row] = []
    for number, count in sorted(wanted.items()):
        members = [row for row, place in zip(left, dealt, strict=True) if place == number]
        rows += drawn(members, count, rng)
    return rows


def trained(
    folder: Path, context: Context, size: Size, arm: str, seed: int, rows: list[data.Row], device: torch.device
) -> Backbone:
    run = folder / ("clean" if arm == "clean_balanced" else "run")
    manifest = data.write_manifest(run, f"{arm}-{seed}", rows)
    config = load(TrainConfig, SETTINGS, [*size.training, f"seed={seed}", "monitors.every_steps=1000"])
    output = folder / "train" / f"{arm}-{seed}"
    train(manifest, config, output, resume=True, device=device.type)
    return load_backbone(str(output), device, seed)[0]


def measured(backbone: Backbone, folder: Path, device: torch.device) -> dict[str, float]:
    labelled = open_labelled(LabelledConfig(path=str(folder / "labelled.parquet")), 0)
    view = View(backbone.side_px, 1.0, ImagesConfig())
    train_features, test_features = (
        extract(backbone, part, view, num_blocks=4, batch_size=256, workers=2)
        for part in (labelled.train, labelled.test)
    )
    near = knn_accuracy(train_features, test_features, NUM_CLASSES, (NEIGHBOURS,), 0.07, device)
    return {
        "knn": near[NEIGHBOURS][0],
        "linear": probe(train_features, test_features, NUM_CLASSES, LinearConfig(), 0, device)[0].test,
    }


def beside(folder: Path, device: torch.device) -> None:
    """Print what no training at all gives."""
    _, random = load_backbone(str(folder / "train" / f"{ARMS[0]}-{SEEDS[0]}"), device, 0)
    for name, backbone in (("random_initialisation", random), ("raw_pixels", PixelBackbone(SIDE_PX, device))):
        print(json.dumps({"bench": "curation_gain", "beside": name, **measured(backbone, folder, device)}), flush=True)


def composition(rows: list[data.Row], kinds: list[str]) -> dict[str, Any]:
    return summary(["clean" if row["number"] is None else kinds[row["number"]] for row in rows])


def summary(kinds: list[str]) -> dict[str, Any]:
    """Return counts of originals, copies, junk and clean images, and of each class among the first two."""
    counts = Counter(kind.partition(" ")[0] for kind in kinds)
    classes = Counter(kind.partition(" ")[2] for kind in kinds if " " in kind)
    return {**dict(sorted(counts.items())), "classes": dict(sorted(classes.items()))}


def report(size: str, metric: str, values: list[float], detail: dict[str, Any], target: float | None = None) -> None:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    proves = size == "full"
    line: dict[str, Any] = {"bench": "curation_gain", "metric": metric, "value": round(mean, 4), "unit": "share"}
    line |= {"sd": round(deviation, 4), "of_seeds": [round(value, 4) for value in values], "target": target}
    line |= {"met": mean > target if proves and target is not None else None, "size": size, "detail": detail}
    if not proves:
        line["note"] = "smoke size: proves nothing"
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
