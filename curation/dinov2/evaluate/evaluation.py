"""All measures of a backbone, always with the same network at random and raw pixels beside it."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.dinov2.checkpoint import clear_errors, write_json
from curation.dinov2.evaluate import pictures
from curation.dinov2.evaluate.backbones import Backbone, PixelBackbone
from curation.dinov2.evaluate.config import EvaluateConfig
from curation.dinov2.evaluate.features import Features, View, extract, prepared
from curation.dinov2.evaluate.knn import feasible, knn_accuracy
from curation.dinov2.evaluate.labelled import Labelled, drawn, open_labelled
from curation.dinov2.evaluate.linear import Head, probe
from curation.dinov2.evaluate.logistic import Logistic, logistic_regression
from curation.dinov2.evaluate.spectrum import spectrum

RESULT_FILE = "evaluation.json"
_ROWS = 16_384

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What was measured of one backbone; accuracies are top-1 shares.

    Attributes:
        name: Of the backbone.
        side_px: Side it saw.
        knn: By number of neighbours.
        knn_top5: As ``knn``, for the five classes with most votes.
        linear: The grid, the head that was best on held-out images first.
        logistic: Logistic regression.
        rankme: Effective rank of the test images' class tokens.
        alpha_req: Decay of their spectrum.
    """

    name: str
    side_px: int
    knn: dict[int, float] = field(default_factory=dict)
    knn_top5: dict[int, float] = field(default_factory=dict)
    linear: tuple[Head, ...] = ()
    logistic: Logistic | None = None
    rankme: float | None = None
    alpha_req: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; the linear probe says which head was chosen, and which would be best on the test set."""
        values = asdict(self)
        if self.linear:
            best = max(self.linear, key=lambda head: head.test)
            values["linear"] = {
                "chosen": asdict(self.linear[0]),
                "best_on_test": asdict(best),
                "grid": [asdict(head) for head in self.linear],
            }
        else:
            values["linear"] = None
        return values


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation.

    Attributes:
        rows: The backbone, the same at random, raw pixels.
        num_train: Images learned from, as many as could be decoded.
        num_test: Images tested on.
        num_classes: Classes; 0 where no labels were needed.
        notes: What was left out, in words.
        files: What was written.
    """

    rows: tuple[Row, ...]
    num_train: int
    num_test: int
    num_classes: int
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def evaluate(
    trained: Backbone,
    random: Backbone,
    config: EvaluateConfig,
    output: Path,
    device: torch.device,
    on_images: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a backbone, the same network at random, and raw pixels; write JSON and pictures.

    Args:
        trained: The backbone.
        random: The same network with random weights.
        config: Data, tasks and their settings.
        output: Folder for ``evaluation.json``, the pictures and, meanwhile, the features.
        device: That computes.
        on_images: Told how many images have been encoded, of how many.

    Raises:
        InputError: The data cannot be used.
        VectorError: The backbone gives features that are not finite.
        DiskFullError: There is no space for features or results.
    """
    data = open_labelled(config.data, config.seed, needs_labels=config.needs_labels)
    with clear_errors(output, "the folder"):
        scratch = output / ".features"
        if scratch.exists():  # of an evaluation that was killed
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True)
    backbones = (trained, random, PixelBackbone(config.raw_side_px, device))
    progress = _Progress(on_images, len(backbones) * sum(len(part) for part in _parts(config, data)))
    try:
        measured = [_measured(backbone, config, data, scratch, device, progress) for backbone in backbones]
    finally:
        shutil.rmtree(scratch)
    rows = tuple(row for row, _ in measured)
    _, features = measured[0]
    notes = _notes(data, features, rows[0], config)
    files = _pictures(backbones, config, data, output) if "pictures" in config.tasks else []
    num_train, num_test = (len(part) for part in features) if len(features) == 2 else (0, len(features[0]))
    found = Evaluation(rows, num_train, num_test, len(data.classes), notes, (*files, output / RESULT_FILE))
    write_json(output / RESULT_FILE, _as_dict(found, config))
    return found


def _parts(config: EvaluateConfig, data: Labelled) -> list[Any]:
    return [data.train, data.test] if config.needs_labels else [data.test]


def _measured(
    backbone: Backbone,
    config: EvaluateConfig,
    data: Labelled,
    scratch: Path,
    device: torch.device,
    progress: "_Progress",
) -> tuple[Row, list[Features]]:
    side_px = _side(backbone, config.side_px)
    view = View(side_px, config.crop_share, config.images)
    features = [
        extract(
            backbone,
            part,
            view,
            num_blocks=max(config.linear.blocks) if "linear" in config.tasks else 1,
            batch_size=config.batch_size,
            workers=config.workers,
            scratch=scratch / str(number),
            on_images=progress.add,
        )
        for number, part in enumerate(_parts(config, data))
    ]
    train, test = features[0], features[-1]  # the same where no labels are needed, and then none is learned from
    measures: dict[str, Any] = {}
    num_classes = len(data.classes)
    if "knn" in config.tasks:
        k = feasible(config.knn.k, len(train))
        found = knn_accuracy(train, test, num_classes, k, config.knn.temperature, device)
        measures["knn"] = {k: top1 for k, (top1, _) in found.items()}
        measures["knn_top5"] = {k: top5 for k, (_, top5) in found.items()}
    if "linear" in config.tasks:
        measures["linear"] = tuple(probe(train, test, num_classes, config.linear, config.seed, device))
    if "logistic" in config.tasks:
        measures["logistic"] = logistic_regression(train, test, num_classes, config.logistic, config.seed, device)
    if "spectrum" in config.tasks:
        rank, alpha = spectrum(_blocks(test), len(test))
        measures |= {"rankme": rank, "alpha_req": alpha}
    return Row(backbone.name, side_px, **measures), [_described(part) for part in features]


def _described(features: Features) -> Features:
    """Return features without their values, whose file goes."""
    return Features(features.slots_NSD[:0], features.label_N, features.has_patches, features.num_unreadable)


def _blocks(features: Features) -> Iterator[Tensor]:
    for start in range(0, len(features), _ROWS):
        yield features.cls(slice(start, start + _ROWS))


def _side(backbone: Backbone, wanted_px: int | None) -> int:
    """Return the side a backbone sees: whole patches; raw pixels have a side of their own."""
    if wanted_px is None or isinstance(backbone, PixelBackbone):
        return backbone.side_px
    return max(1, round(wanted_px / backbone.patch_px)) * backbone.patch_px


def _notes(data: Labelled, features: list[Features], row: Row, config: EvaluateConfig) -> tuple[str, ...]:
    notes = []
    unreadable = sum(part.num_unreadable for part in features)
    if unreadable:
        notes.append(f"{unreadable} images cannot be decoded and were left out")
    if data.num_unlabelled:
        notes.append(f"{data.num_unlabelled} images have no label and were left out")
    if config.needs_labels:
        unseen = set(features[1].label_N.tolist()) - set(features[0].label_N.tolist())
        if unseen:
            names = ", ".join(data.classes[label] for label in sorted(unseen)[:5])
            notes.append(f"{len(unseen)} classes of the test images are never learned from, such as {names}")
    too_large = sorted(set(config.knn.k) - row.knn.keys())
    if "knn" in config.tasks and too_large:
        instead = f"all {len(features[0])} vote instead" if len(too_large) == len(set(config.knn.k)) else "left out"
        notes.append(
            f"k-NN with k = {', '.join(map(str, too_large))}: there are only {len(features[0])} images to learn from; "
            f"{instead}"
        )
    if config.side_px is not None and row.side_px != config.side_px:
        notes.append(f"side_px {config.side_px} is not a whole number of patches; {row.side_px} was shown")
    if row.linear and any(head.diverged for head in row.linear):
        notes.append(f"{sum(head.diverged for head in row.linear)} heads of the linear grid diverged and count as 0")
    for note in notes:
        _log.warning("%s", note)
    return tuple(notes)


def _pictures(backbones: tuple[Backbone, ...], config: EvaluateConfig, data: Labelled, output: Path) -> list[Path]:
    """Write the pictures of the backbone and of the same at random."""
    files: list[Path] = []
    # Sets are often sorted by class: the first images would all be of one.
    chosen = drawn(data.test, config.pictures.num_images, [config.seed])
    for backbone, prefix in zip(backbones, ("", "random_"), strict=False):
        side_px = _side(backbone, config.pictures.side_px or config.side_px)
        shown = prepared(chosen, View(side_px, config.crop_share, config.images), config.workers)
        readable = [pixels for pixels, _ in shown if pixels is not None]
        if not readable:
            _log.warning("no pictures: none of the %d images drawn for them can be decoded", len(chosen))
            return files
        pixels_NHW3 = np.stack(readable)
        with torch.no_grad():
            made = {
                "attention": pictures.attention_picture(backbone, pixels_NHW3, config.pictures.cell_px),
                "components": pictures.components_picture(backbone, pixels_NHW3, config.pictures.cell_px),
            }
        for name, picture in made.items():
            if picture is not None:
                files.append(output / f"{prefix}{name}.png")
                pictures.write_png(files[-1], picture)
    return files


def _as_dict(found: Evaluation, config: EvaluateConfig) -> dict[str, Any]:
    return {
        "rows": [row.as_dict() for row in found.rows],
        "num_train": found.num_train,
        "num_test": found.num_test,
        "num_classes": found.num_classes,
        "notes": list(found.notes),
        "settings": config.model_dump(mode="json"),
    }


class _Progress:
    def __init__(self, tell: Callable[[int, int], None] | None, total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0

    def add(self, num_images: int) -> None:
        self._done += num_images
        if self._tell is not None:
            self._tell(self._done, self._total)
