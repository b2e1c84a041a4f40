"""How many small faces are found on large photos, shrunk and tile by tile, and at what cost?

Large photos are laid out of crowd photos and flowers at their own size, so faces stay as small as they are; prints a
JSON line for each size and way. Data: as ``faces_curve.py``.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faces_curve import CONFIG, LIMITS, MIN_IOU, ROOT, TARGETS, Photo, labelled, unlabelled
from PIL import Image

from curation import images
from curation.models.faces import FaceDetector, iou
from curation.models.weights import resolve

SIZES = ((1600, 1200), (3200, 2400), (4000, 3000))
CELL = (400, 300)
Labels = list[tuple[str, npt.NDArray[np.float64]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CURATION_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--photos", type=int, default=2, help="of each size")
    parser.add_argument("--crowds", type=float, default=1.0, help="share of the parts that are crowds; others: flowers")
    args = parser.parse_args()
    crowds, flowers = list(labelled(args.data)), list(unlabelled(args.data))
    settings = (resolve(CONFIG.weights), CONFIG.min_score, CONFIG.scales, CONFIG.max_side_px)
    for size in SIZES:
        photos = [laid_out(size, crowds, flowers, args.crowds, np.random.default_rng(n)) for n in range(args.photos)]
        for tiled in (False, True):
            report(FaceDetector(*settings, tiled=tiled), photos, {"tiled": tiled, "size": size, "crowds": args.crowds})


def laid_out(
    size: tuple[int, int],
    crowds: Sequence[Photo],
    flowers: Sequence[Photo],
    share: float,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Return a large photo and its labelled faces, those left out that the cut of a part goes through."""
    corners = [(x, y) for y in range(0, size[1], CELL[1]) for x in range(0, size[0], CELL[0])]
    order, is_crowd = rng.permutation(len(crowds)), rng.permutation(len(corners)) < share * len(corners)
    canvas, labels = np.zeros((size[1], size[0], 3), np.uint8), []
    for number, (x, y) in enumerate(corners):
        photo = crowds[order[number % len(crowds)]] if is_crowd[number] else flowers[rng.integers(len(flowers))]
        part = images.decode(photo.data, LIMITS)
        if not is_crowd[number]:
            part = np.asarray(Image.fromarray(part).resize(CELL))
        part = part[: min(CELL[1], size[1] - y), : min(CELL[0], size[0] - x)]
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        whole = [(kind, box) for kind, box in photo.labels if box[2] <= part.shape[1] and box[3] <= part.shape[0]]
        labels += [(kind, box + np.array([x, y, x, y])) for kind, box in whole]
    return canvas, labels


def report(
    detector: FaceDetector, photos: Sequence[tuple[npt.NDArray[np.uint8], Labels]], setting: dict[str, object]
) -> None:
    start, hits = time.process_time(), []
    for rgb_HW3, labels in photos:
        boxes_N4 = detector.detect(rgb_HW3).boxes_N4
        hits += [
            (kind, min(box[2:] - box[:2]) <= 40, (iou(box[None], boxes_N4) >= MIN_IOU).any()) for kind, box in labels
        ]
    cpu_s = (time.process_time() - start) / len(photos)
    for kind in TARGETS:
        for largest in ("all", "20 to 40 px"):
            found = [hit for other, is_small, hit in hits if other == kind and (is_small or largest == "all")]
            if found:
                line = {"bench": "faces_tiles", "metric": f"recall_{kind}", "value": round(float(np.mean(found)), 4)}
                detail = {"faces": len(found), "sides": largest, "cpu_s_per_photo": round(cpu_s, 2), **setting}
                print(json.dumps({**line, "unit": "share", "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
