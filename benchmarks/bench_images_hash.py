"""The PCA hash against ``imagehash.phash``, both from JPEG bytes on one thread, and how well it collides.

Speed: the 1,000 photos of ``photos.parquet`` (short side 256) and 12-megapixel JPEGs, made of photos that scikit-image
ships, enlarged with Lanczos and given the grain that they then lack (Gaussian noise of ``--grain`` grey levels,
seeded), baseline, quality 90. Both are measured again with Huffman codes of their own (``optimize``), whose tables
have to be built for each file. Sides alternate; a ratio is that of medians over ``--rounds``. ``--clock cpu`` (the
default) counts the thread's own time, which other processes disturb least.

Collisions: the share of mildly edited photos (quality 75 to 95, 2 % larger or smaller) with an equal hash, and with
one within a bit, for the PCA fitted on the photos, the default PCA, and imagehash's hashes; the least distance of
different photos; and how often the hash from coefficients is not that of the pixels.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import imagehash
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import skimage.data
from PIL import Image

from curation.config.images import ImagesConfig
from curation.images import decode
from curation.stages.pca_hash import PcaHash, default_pca, fit
from curation.stages.small_grey import grey_thumbnail, small_grey

SIDE_PX = 32
BATCH = 256
PIXELS = 12_000_000
TARGET = 4.0
LIMITS = ImagesConfig()
EDITS = [(1.0, quality) for quality in (75, 80, 85, 90, 95)]
EDITS += [(scale, quality) for scale in (0.98, 1.02) for quality in (75, 90, 95)]
Hashes = npt.NDArray[np.uint64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=int, default=1000, help="photos of photos.parquet")
    parser.add_argument("--edited", type=int, default=400, help="photos that are edited")
    parser.add_argument("--grain", type=float, default=2.0, help="grey levels")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    options = parser.parse_args()
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    files = photos(options.photos)
    large = enlarged(options.grain)
    pca = fit(greys(files)) if files else default_pca(SIDE_PX)
    sets = {"ratio_vs_imagehash_phash": files, "ratio_vs_imagehash_phash_12mpx": large}
    sets |= {f"{name}_own_codes": [recoded(data) for data in some] for name, some in sets.items()}
    for name, some in sets.items():
        if some:
            report(name, *speed(some, pca, options.rounds, clock), "x", TARGET if "own_codes" not in name else None)
    if files:
        collisions(files, options.edited, pca)


def speed(
    files: Sequence[bytes], pca: PcaHash, rounds: int, clock: Callable[[], float]
) -> tuple[float, dict[str, Any]]:
    """Return the ratio of medians, and what was measured."""
    sides: dict[str, Callable[[], Any]] = {
        "phash": lambda: [imagehash.phash(Image.open(io.BytesIO(data))) for data in files],
        "pca_hash": lambda: hashes(files, pca),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    hashes(files[:2], pca)  # compiles
    for _ in range(rounds):
        for name, side in sides.items():
            start = clock()
            side()
            seconds[name].append(clock() - start)
    ms = {name: round(median(values) / len(files) * 1e3, 4) for name, values in seconds.items()}
    kilobytes = round(sum(map(len, files)) / len(files) / 1e3, 1)
    return ms["phash"] / ms["pca_hash"], {"ms": ms, "files": len(files), "kilobytes": kilobytes, "rounds": rounds}


def greys(files: Sequence[bytes]) -> npt.NDArray[np.uint16]:
    return np.stack([small_grey(data, LIMITS, SIDE_PX).ravel() for data in files])


def hashes(files: Sequence[bytes], pca: PcaHash) -> Hashes:
    return np.concatenate([pca(greys(files[start : start + BATCH])) for start in range(0, len(files), BATCH)])


def collisions(files: Sequence[bytes], num_edited: int, fitted: PcaHash) -> None:
    decoded = [Image.fromarray(decode(data, LIMITS)) for data in files[:num_edited]]
    edited = [[edit(image, *how) for image in decoded] for how in EDITS]

    def library(name: str) -> Callable[[Sequence[bytes]], Hashes]:
        function = getattr(imagehash, name)
        return lambda some: np.array([int(str(function(Image.open(io.BytesIO(data)))), 16) for data in some], np.uint64)

    methods: dict[str, Callable[[Sequence[bytes]], Hashes]] = {
        "pca_fit": lambda some: hashes(some, fitted),
        "pca_default": lambda some: hashes(some, default_pca(SIDE_PX)),
        **{name: library(name) for name in ("phash", "dhash")},
    }
    for name, method in methods.items():
        own = method(files)
        distances = np.bitwise_count(own[: len(decoded)] ^ np.stack([method(some) for some in edited]))
        others = np.bitwise_count(own[:, None] ^ own)[np.triu_indices(len(own), 1)]
        is_ours = name.startswith("pca")
        detail = {"photos": len(files), "edited": distances.size}
        report(f"{name}_edits_equal", float((distances == 0).mean()), detail, "share", 0.88 if is_ours else None)
        report(f"{name}_edits_within_1", float((distances <= 1).mean()), detail, "share", 0.97 if is_ours else None)
        report(f"{name}_others_nearest", int(others.min()), detail, "bits", 2 if is_ours else None)
        report(f"{name}_others_within_1", int((others <= 1).sum()), detail | {"pairs": len(others)}, "pairs", None)
        if is_ours:
            pca = fitted if name == "pca_fit" else default_pca(SIDE_PX)
            pixels = pca(np.stack([grey_thumbnail(decode(data, LIMITS), SIDE_PX).ravel() for data in files]))
            report(f"{name}_differs_from_pixels", float((pixels != own).mean()), detail, "share", None)


def edit(image: Image.Image, scale: float, quality: int) -> bytes:
    if scale != 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def recoded(data: bytes) -> bytes:
    """Return the picture with Huffman codes made for it."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(data))
    image.save(buffer, "JPEG", quality="keep", optimize=True)
    return buffer.getvalue()


def photos(count: int) -> list[bytes]:
    folder = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = folder / "photos.parquet"
    if not path.exists():
        return []
    return [row["bytes"] for row in pq.read_table(path, columns=["image"])["image"].to_pylist()[:count]]


def enlarged(grain: float) -> list[bytes]:
    """Return 12-megapixel JPEGs of different photos."""
    rng = np.random.default_rng(0)
    files = []
    for photo in (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()):
        height, width = photo.shape[:2]
        factor = (PIXELS / (height * width)) ** 0.5
        size = (round(width * factor), round(height * factor))
        rgb = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
        rgb += rng.standard_normal((*rgb.shape[:2], 1), np.float32) * grain
        buffer = io.BytesIO()
        Image.fromarray(np.clip(rgb.round(), 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def report(metric: str, value: float, detail: dict[str, Any], unit: str, target: float | None) -> None:
    line = {"bench": "images_hash", "metric": metric, "value": round(value, 4), "unit": unit}
    line |= {"target": target, "met": None if target is None else value >= target, "detail": detail}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
