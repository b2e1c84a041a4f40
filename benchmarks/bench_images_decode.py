"""Reduced-scale decoding of 12-megapixel JPEGs for a 288-pixel consumer, against Pillow's full decode and resize.

Photos are what scikit-image and scikit-learn ship, and, where ``CURATION_TEST_DATA`` has them, larger ones. None has
12 megapixels, so each is enlarged to that with Lanczos and gets the detail it then lacks as grain: Gaussian noise,
equal in the three channels, of ``--grain`` grey levels (seeded), and is saved as a baseline 4:2:0 JPEG of quality 90.
The gain depends on the file's size, because Huffman decoding cannot be left out: one photo is measured at several
grains.

Each ratio is the median over photos of a ratio of medians over ``--rounds``, sides alternating. ``--clock cpu`` (the
default) counts the thread's own CPU time, which other processes on the machine disturb least; both sides are one
thread.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
import sklearn.datasets
from PIL import Image

from curation import images
from curation.config.images import ImagesConfig
from curation.errors import WeightsError
from curation.models.sscd import SscdEncoder
from curation.models.weights import resolve

SIDE_PX = 288
PIXELS = 12_000_000
QUALITY = 90
MODES = {"1x": 1.0, "2x": 2.0}
TARGETS = {"1x": {"ratio": 5.0, "mean": 0.99, "worst": 0.98}, "2x": {"ratio": 3.5, "mean": 0.99, "worst": 0.99}}
SHIPPED = """astronaut.png camera.png cell.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png moon.png
motorcycle_left.png retina.jpg rocket.jpg brick.png gravel.png"""
SHARED = "copies/aaa-orig.jpg faces_clean/bald_guys.jpg faces_clean/dogs.jpg faces_clean/Tom_Cruise_avp_2014_4.jpg"
LIMITS = ImagesConfig()
Pixels = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grain", type=float, default=2.0, help="grey levels; a phone's daylight photo has 1 to 3")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    options = parser.parse_args()
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    encoder = open_encoder()
    rng = np.random.default_rng(0)
    ratios: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    cosines: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    sizes: dict[str, float] = {}
    for name, photo in photos():
        data = enlarged(photo, options.grain, rng)
        sizes[name] = round(len(data) / 1e6, 2)
        seconds = alternate(sides(data), options.rounds, clock)
        full, *reduced = encoder([side() for side in sides(data).values()]) if encoder else [None] * 3
        for mode, features in zip(MODES, reduced, strict=True):
            ratios[mode][name] = seconds["pillow"] / seconds[mode]
            if full is not None:
                cosines[mode][name] = float(full @ features)
    common = {"photos": len(sizes), "megabytes": sizes, "grain": options.grain, "clock": options.clock}
    for mode, target in TARGETS.items():
        report(
            f"decode_{mode}_vs_pillow_full",
            median(ratios[mode].values()),
            "x",
            target["ratio"],
            common | rounded(ratios[mode]),
        )
        if cosines[mode]:
            values = cosines[mode]
            report(
                f"sscd_cosine_{mode}_mean",
                float(np.mean(list(values.values()))),
                "cosine",
                target["mean"],
                rounded(values),
            )
            report(
                f"sscd_cosine_{mode}_worst",
                min(values.values()),
                "cosine",
                target["worst"],
                {"photo": min(values, key=values.get)},
            )
    by_grain(rng, options.rounds, clock)


def by_grain(rng: np.random.Generator, rounds: int, clock: Callable[[], float]) -> None:
    """Report how the gain falls as a file of the same size in pixels gets larger in bytes; these have no target."""
    name, photo = list(photos())[-1]
    for grain in (0.0, 2.0, 4.0, 8.0):
        data = enlarged(photo, grain, rng)
        seconds = alternate(sides(data), rounds, clock)
        for mode in MODES:
            detail = {"photo": name, "grain": grain, "megabytes": round(len(data) / 1e6, 2)}
            detail |= {"ms": {side: round(value * 1e3, 1) for side, value in seconds.items()}}
            report(
                f"decode_{mode}_vs_pillow_full_grain_{grain:g}", seconds["pillow"] / seconds[mode], "x", None, detail
            )


def sides(data: bytes) -> dict[str, Callable[[], Pixels]]:
    """Return what is compared: each gives the consumer's (288, 288, 3) pixels."""

    def pillow() -> Pixels:
        return resized(Image.open(io.BytesIO(data)).convert("RGB"))

    def reduced(headroom: float) -> Callable[[], Pixels]:
        return lambda: resized(Image.fromarray(images.decode(data, LIMITS, SIDE_PX, headroom)))

    return {"pillow": pillow, **{mode: reduced(headroom) for mode, headroom in MODES.items()}}


def resized(image: Image.Image) -> Pixels:
    """Resize as ``SscdEncoder.prepare`` does."""
    return np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))


def alternate(calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each side, the sides taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: median(values) for name, values in seconds.items()}


def photos() -> Iterator[tuple[str, Image.Image]]:
    """Yield different photos by name; brick, gravel, moon, cell and ihc are textures, hubble and retina instruments."""
    shared = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    folder = Path(sklearn.datasets.__file__).parent / "images"
    paths = [Path(skimage.data.__file__).parent / name for name in SHIPPED.split()]
    paths += [folder / "china.jpg", folder / "flower.jpg", *(shared / name for name in SHARED.split())]
    for path in paths:
        if path.is_file():
            yield path.stem, Image.open(path).convert("RGB")


def enlarged(photo: Image.Image, grain: float, rng: np.random.Generator) -> bytes:
    """Return a 12-megapixel JPEG of a photo."""
    scale = (PIXELS / (photo.width * photo.height)) ** 0.5
    large = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    rgb = np.asarray(large, dtype=np.float32)
    rgb = rgb + np.float32(grain) * rng.standard_normal((*rgb.shape[:2], 1), dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(rgb.round(), 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def open_encoder() -> SscdEncoder | None:
    try:
        return SscdEncoder(resolve("immaculate-sscd"), batch_size=1 + len(MODES))
    except WeightsError:
        return None


def rounded(values: dict[str, float]) -> dict[str, Any]:
    return {"by_photo": {name: round(value, 4) for name, value in values.items()}}


def report(metric: str, value: float, unit: str, target: float | None, detail: dict[str, Any]) -> None:
    line = {"bench": "images_decode", "metric": metric, "value": round(value, 4), "unit": unit}
    if target is not None:
        line |= {"target": target, "met": value >= target}
    print(json.dumps(line | {"detail": detail}), flush=True)


if __name__ == "__main__":
    main()
