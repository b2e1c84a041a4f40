"""Which scales and which threshold find how many faces, at how many false alarms? And does the blur hold?

Detects once at every scale, then combines and thresholds in memory; draws ``docs/faces_curve.png`` and prints a JSON
line for each figure. Data: crowd photos with boxes (``faces``), photos with clean boxes (``faces_clean``) and photos of
flowers, on which every detection counts as a false alarm, in the folder that ``CURATION_TEST_DATA`` names.
"""

import argparse
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from curation import images
from curation.config.images import FacesConfig, ImagesConfig
from curation.jpeg_coding import coding_of, encode_jpeg
from curation.models.faces import MIN_VOTE, FaceDetector, agreed, iou, suppressed
from curation.models.weights import resolve
from curation.stage import ImageRow
from curation.stages.faces import FacesStage, audit_faces
from curation.stages.hiding import with_margin

ROOT = Path(__file__).resolve().parents[1]
SCALE_SETS = ((1.0,), (1.0, 1.5), (1.0, 2.0), (1.0, 2.5), (1.0, 3.0), (0.5, 1.0, 2.0), (1.0, 1.5, 2.0), (1.0, 2.0, 3.0))
TARGETS = {"bare": 0.98, "masked": 0.93, "clean": 0.95}
MAX_FALSE_ALARMS = 0.08
MIN_SIDE_PX, MIN_IOU = 20, 0.4
CONFIG, LIMITS = FacesConfig(), ImagesConfig()


@dataclass
class Photo:
    """One image, its labelled faces (kind, box), and what each scale finds."""

    data: bytes
    labels: list[tuple[str, npt.NDArray[np.float64]]]
    size: tuple[int, int] = (0, 0)
    used: dict[float, tuple[int, int]] = field(default_factory=dict)  # scale -> width and height that were searched
    found: dict[tuple[int, int], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CURATION_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "faces_curve.png")
    parser.add_argument("--only-hiding", action="store_true", help="leave out the curve")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    crowds, flowers = list(labelled(args.data)), list(unlabelled(args.data))
    detector = FaceDetector(resolve(CONFIG.weights), CONFIG.min_score, CONFIG.scales, CONFIG.max_side_px)
    with ThreadPoolExecutor(args.threads) as pool:
        if not args.only_hiding:
            list(pool.map(lambda photo: search(detector, photo), crowds + flowers))
            pairs = [(scales, combine) for scales in SCALE_SETS for combine in ("mean", "max")]
            curves = {(scales, combine): curve(crowds, flowers, scales, combine) for scales, combine in pairs}
            report_default(curves[CONFIG.scales, "mean"], crowds, flowers)
            report_halves(crowds, flowers)
            draw(curves).save(args.plot, optimize=True)
        others = {
            "package_1x_0.5": FaceDetector(resolve(CONFIG.weights), 0.5, (1.0,), CONFIG.max_side_px),
            "any_scale_0.5": FaceDetector(
                resolve(CONFIG.weights), 0.5, CONFIG.scales, CONFIG.max_side_px, combine="max"
            ),
        }
        for scale in (0.75, 1.5, 3.0):
            others[f"{scale:g}x_0.5"] = FaceDetector(resolve(CONFIG.weights), 0.5, (scale,), CONFIG.max_side_px)
        report_hiding(list(pool.map(lambda photo: hidden_result(photo, {"same": detector, **others}), crowds)))


def labelled(folder: Path) -> Iterator[Photo]:
    """Yield crowd photos (VOC boxes of at least 20 pixels a side), then those of ``faces_clean`` (dlib boxes)."""
    for path in sorted((folder / "faces").glob("*.xml")):
        labels = []
        for item in ET.parse(path).getroot().iter("object"):  # noqa: S314 - local, ours
            box = np.array([float(item.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax")])
            if (box[2:] - box[:2]).min() >= MIN_SIDE_PX:
                labels.append(("bare" if item.findtext("name") == "without_mask" else "masked", box))
        yield Photo(path.with_suffix(".jpg").read_bytes(), labels)
    for name in ("training.xml", "testing.xml"):
        for image in ET.parse(folder / "faces_clean" / name).getroot().iter("image"):  # noqa: S314
            corners = [[float(box.get(side, "0")) for side in ("left", "top", "width", "height")] for box in image]
            labels = [("clean", np.array([x, y, x + width, y + height])) for x, y, width, height in corners]
            yield Photo((folder / "faces_clean" / image.get("file", "")).read_bytes(), labels)


def unlabelled(folder: Path) -> Iterator[Photo]:
    for row in pq.read_table(folder / "flowers.parquet", columns=["image"]).column("image").to_pylist():
        yield Photo(row["bytes"], [])


def search(detector: FaceDetector, photo: Photo) -> None:
    rgb_HW3 = images.decode(photo.data, LIMITS)
    height, width = rgb_HW3.shape[:2]
    photo.size = (width, height)
    for scale in sorted({scale for scales in SCALE_SETS for scale in scales}):
        used = min(scale, CONFIG.max_side_px / max(width, height))  # as FaceDetector.sizes does
        size = photo.used[scale] = (round(width * used), round(height * used))
        if size not in photo.found:
            photo.found[size] = detector.search(rgb_HW3, size, MIN_VOTE)


def combined(
    photo: Photo, scales: Sequence[float], combine: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return boxes and scores as ``FaceDetector.detect`` combines them, before its threshold."""
    found = [photo.found[size] for size in sorted({photo.used[scale] for scale in scales})]
    boxes_N4, scores_N = agreed(found, MIN_VOTE) if combine == "mean" else suppressed(found)
    return np.clip(boxes_N4, 0, [*photo.size, *photo.size]), scores_N


def best_scores(photos: Sequence[Photo], scales: Sequence[float], combine: str) -> list[list[tuple[str, float]]]:
    """Return for each photo the score at which each labelled face is found; 0: never."""
    result = []
    for photo in photos:
        boxes_N4, scores_N = combined(photo, scales, combine)
        overlaps = [(kind, iou(box[None], boxes_N4)[0] >= MIN_IOU) for kind, box in photo.labels]
        result.append([(kind, float(scores_N[hit_N].max(initial=0))) for kind, hit_N in overlaps])
    return result


def alarms(photos: Sequence[Photo], scales: Sequence[float], combine: str) -> npt.NDArray[np.float64]:
    """Return the highest score in each photo."""
    return np.array([combined(photo, scales, combine)[1].max(initial=0) for photo in photos])


THRESHOLDS = np.round(np.arange(0.05, 1.0, 0.01), 2)


def curve(
    crowds: Sequence[Photo], flowers: Sequence[Photo], scales: Sequence[float], combine: str
) -> dict[str, npt.NDArray[np.float64]]:
    """Return recall of each kind and the share of images with false alarms at each of ``THRESHOLDS``."""
    scores = [pair for pairs in best_scores(crowds, scales, combine) for pair in pairs]
    by_kind = {kind: np.array([score for other, score in scores if other == kind]) for kind in TARGETS}
    by_kind["false_alarms"] = alarms(flowers, scales, combine)
    return {kind: (values[None] >= THRESHOLDS[:, None]).mean(axis=1) for kind, values in by_kind.items()}


def line(metric: str, value: float, target: float, met: bool, **detail: object) -> None:
    print(
        json.dumps(
            {
                "bench": "faces",
                "metric": metric,
                "value": round(float(value), 4),
                "unit": "share",
                "target": target,
                "met": bool(met),
                "detail": detail,
            }
        ),
        flush=True,
    )


def report_default(
    default: dict[str, npt.NDArray[np.float64]], crowds: Sequence[Photo], flowers: Sequence[Photo]
) -> None:
    row = int(np.argmin(np.abs(THRESHOLDS - CONFIG.min_score)))
    setting = {"min_score": CONFIG.min_score, "scales": CONFIG.scales}
    for kind, target in TARGETS.items():
        count = sum(label == kind for photo in crowds for label, _ in photo.labels)
        line(f"recall_{kind}", default[kind][row], target, default[kind][row] >= target, faces=count, **setting)
    value = default["false_alarms"][row]
    line("false_alarms", value, MAX_FALSE_ALARMS, value <= MAX_FALSE_ALARMS, images=len(flowers), **setting)


def report_halves(crowds: Sequence[Photo], flowers: Sequence[Photo], num_splits: int = 200) -> None:
    """Choose the threshold on half of the images by the rule of ``docs/faces.md``, measure on the other half."""
    faces, tops = best_scores(crowds, CONFIG.scales, "mean"), alarms(flowers, CONFIG.scales, "mean")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_splits):
        mine, theirs = rng.permutation(len(flowers)), rng.permutation(len(crowds))
        shares = (tops[mine[: len(flowers) // 2], None] >= THRESHOLDS).mean(axis=0)
        threshold = float(THRESHOLDS[np.argmax(shares <= MAX_FALSE_ALARMS - 0.01)])
        others = [pair for photo in theirs[len(crowds) // 2 :] for pair in faces[photo]]
        recalls = [np.mean([score >= threshold for kind, score in others if kind == wanted]) for wanted in TARGETS]
        rows.append((threshold, (tops[mine[len(flowers) // 2 :]] >= threshold).mean(), *recalls))
    means, lows, highs = np.mean(rows, axis=0), np.percentile(rows, 5, axis=0), np.percentile(rows, 95, axis=0)
    for place, (metric, target) in enumerate({"false_alarms": MAX_FALSE_ALARMS, **TARGETS}.items(), start=1):
        met = means[place] <= target if metric == "false_alarms" else means[place] >= target
        detail = {"p5": round(lows[place], 4), "p95": round(highs[place], 4), "mean_threshold": round(means[0], 3)}
        line(f"other_half_{metric}", means[place], target, met, splits=num_splits, **detail)


@dataclass(frozen=True)
class Hidden:
    """How one photo came out of the stage."""

    num_hidden: int
    num_again: dict[str, int]
    error_ours: npt.NDArray[np.float64]  # mean, 99th and 99.9th percentile and maximum outside of the ellipses
    error_plain: npt.NDArray[np.float64]


def hidden_result(photo: Photo, auditors: dict[str, FaceDetector]) -> Hidden | None:
    """Return how a photo comes out of the stage; None where nothing is found."""
    rgb_HW3 = images.decode(photo.data, LIMITS)
    result = FacesStage(auditors["same"], CONFIG, LIMITS).prepare(ImageRow(0, "", photo.data, rgb_HW3))
    coding = coding_of(photo.data)
    if not len(result.faces) or coding is None or result.format != "jpeg":
        return None
    boxes_N4 = result.faces.boxes_N4
    audits = {name: audit_faces(auditor, result.data, boxes_N4, LIMITS) for name, auditor in auditors.items()}
    turned = images.encode(np.ascontiguousarray(images.decode(result.data, LIMITS)[:, ::-1]), "png")
    flipped_N4 = np.column_stack((rgb_HW3.shape[1] - boxes_N4[:, 2::-2], boxes_N4[:, 1::2]))[:, [0, 2, 1, 3]]
    for name, auditor in auditors.items():
        audits[f"{name}_mirrored"] = audit_faces(auditor, turned, flipped_N4, LIMITS)
    outside_HW = np.ones(rgb_HW3.shape[:2], dtype=bool)
    y, x = np.mgrid[0 : rgb_HW3.shape[0], 0 : rgb_HW3.shape[1]] + 0.5
    for box in boxes_N4:
        left, top, right, bottom = with_margin(box, CONFIG.margin)
        across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        outside_HW &= across**2 + down**2 > 1

    def error(data: bytes) -> npt.NDArray[np.float64]:
        differences = np.abs(images.decode(data, LIMITS).astype(int) - rgb_HW3).max(axis=2)[outside_HW]
        return np.array([differences.mean(), *np.percentile(differences, (99, 99.9)), differences.max()])

    again = {name: audit.num_found_again for name, audit in audits.items()}
    return Hidden(audits["same"].num_hidden, again, error(result.data), error(encode_jpeg(rgb_HW3, coding)))


def report_hiding(results: Sequence[Hidden | None]) -> None:
    hidden = [result for result in results if result is not None]
    faces = sum(result.num_hidden for result in hidden)
    for auditor in hidden[0].num_again:
        share = sum(result.num_again[auditor] for result in hidden) / faces
        line(f"found_again_{auditor}", share, 0.01, share <= 0.01, faces=faces, images=len(hidden))
    ours, plain = (np.array([getattr(result, name) for result in hidden]) for name in ("error_ours", "error_plain"))
    for place, name in enumerate(("mean", "p99", "p99.9", "max")):
        ratio = ours[:, place].mean() / plain[:, place].mean()
        at_most = float((ours[:, place] <= plain[:, place]).mean())
        levels = {"ours": round(ours[:, place].mean(), 3), "plain_reencode": round(plain[:, place].mean(), 3)}
        line(f"outside_error_{name}_vs_reencode", ratio, 1.0, ratio <= 1, **levels, images_at_most_plain=at_most)


COLOURS = ("#888888", "#d95f02", "#1f6fd0", "#7570b3", "#66a61e", "#e7298a", "#a6761d", "#17a2b8")
SIZE, LEFT, TOP, PANEL = (1500, 640), 80, 60, (600, 500)


def draw(curves: dict[tuple[tuple[float, ...], str], dict[str, npt.NDArray[np.float64]]]) -> Image.Image:
    """Return both panels: masked recall against false alarms, and both against the threshold of the default scales."""
    plot = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(plot)
    pen.font = ImageFont.load_default(15)
    left = Panel(pen, LEFT, (0, 0.2), (0.8, 1.0), "share of flower images with a false alarm", "recall of masked faces")
    left.region((0, MAX_FALSE_ALARMS), (TARGETS["masked"], 1.0))
    for number, scales in enumerate(SCALE_SETS):
        for combine, width in (("max", 1), ("mean", 3)):
            found = curves[scales, combine]
            left.path(found["false_alarms"], found["masked"], COLOURS[number], width)
        pen.text(
            (LEFT + 400, TOP + 320 + 20 * number), " + ".join(f"{scale:g}" for scale in scales) + "x", COLOURS[number]
        )
    pen.text((LEFT + 400, TOP + 300), "scales: thick mean, thin best", "black")
    right = Panel(pen, LEFT + 760, (0, 1.0), (0, 1.0), "min_score at 1 + 2x, mean", "share")
    default = curves[CONFIG.scales, "mean"]
    for kind, colour in {"bare": "#1b9e77", "masked": "#1f6fd0", "clean": "#7570b3", "false_alarms": "#d95f02"}.items():
        right.path(THRESHOLDS, default[kind], colour, 2)
        pen.text((LEFT + 780, {"bare": 180, "clean": 200, "masked": 220, "false_alarms": 240}[kind]), kind, colour)
    row = int(np.argmin(np.abs(THRESHOLDS - CONFIG.min_score)))
    left.mark(float(default["false_alarms"][row]), float(default["masked"][row]), f"default: {CONFIG.min_score}")
    right.path(np.array([CONFIG.min_score] * 2), np.array([0.0, 1.0]), "#000000", 1)
    return plot


class Panel:
    """One pair of axes."""

    def __init__(
        self,
        pen: ImageDraw.ImageDraw,
        left: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_label: str,
        y_label: str,
    ) -> None:
        self._pen, self._left, self._x, self._y = pen, left, x_range, y_range
        pen.rectangle((left, TOP, left + PANEL[0], TOP + PANEL[1]), outline="black")
        pen.text((left + 150, TOP + PANEL[1] + 35), x_label, "black")
        pen.text((left, TOP - 25), y_label, "black")
        for step in range(5):
            x = x_range[0] + (x_range[1] - x_range[0]) * step / 4
            y = y_range[0] + (y_range[1] - y_range[0]) * step / 4
            pen.text((self.point(x, y_range[0])[0] - 10, TOP + PANEL[1] + 10), f"{x:.2f}", "black")
            pen.text((left - 40, self.point(x_range[0], y)[1] - 8), f"{y:.2f}", "black")

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value lies on the picture."""
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        return self._left + across * PANEL[0], TOP + (1 - up) * PANEL[1]

    def path(self, x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64], colour: str, width: int) -> None:
        """Draw the part of a curve that lies within the axes."""
        inside = (x_N >= self._x[0]) & (x_N <= self._x[1]) & (y_N >= self._y[0]) & (y_N <= self._y[1])
        points = [self.point(float(x), float(y)) for x, y in zip(x_N[inside], y_N[inside], strict=True)]
        self._pen.line(points, colour, width)

    def region(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        """Shade what meets the targets."""
        corner, other = self.point(x_range[0], y_range[1]), self.point(x_range[1], y_range[0])
        self._pen.rectangle((*corner, *other), fill="#e8f5e9", outline="#2e7d32")
        self._pen.text((corner[0] + 8, corner[1] + 6), "asked for", "#2e7d32")

    def mark(self, x: float, y: float, text: str) -> None:
        """Put a dot with a text."""
        column, row = self.point(x, y)
        self._pen.ellipse((column - 6, row - 6, column + 6, row + 6), fill="black")
        self._pen.text((column + 10, row + 4), text, "black")


if __name__ == "__main__":
    main()
