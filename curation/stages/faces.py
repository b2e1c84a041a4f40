"""Find faces, blur them for good, and hand on images without metadata.

What is stored of an image comes from here. An image without faces keeps its coded pixels; only metadata goes. An image
with faces is encoded anew, then searched again as it will be stored: what is still found is blurred more strongly, and
in the end filled with one colour.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from curation import images, schema
from curation.config import FacesConfig, ImagesConfig
from curation.models.faces import FaceDetector, Faces
from curation.stage import ImageRow

# A face is averaged into so many cells along its shorter side, per round of blurring: what is left of it does not grow
# with its size, and cannot be computed back. One cell is one colour.
_CELLS = (4, 2, 1)
_MAX_ROUNDS = 6  # of blurring and searching again; of 50 crowd photos 29 took one, 17 two, 2 three, 1 four
_FILL_LEVEL = len(_CELLS)  # then the whole rectangle in one colour, as an ellipse can still look like a head


@dataclass(frozen=True)
class Region:
    """A face to hide.

    Attributes:
        box_4: Left, top, right, bottom in pixels, as detected.
        level: 0: usual blur; each level above hides more; 3: a rectangle of one colour.
    """

    box_4: npt.NDArray[np.float32]
    level: int = 0


@dataclass(frozen=True)
class HiddenFaces:
    """What ``FacesStage.prepare`` makes of one image.

    Attributes:
        faces: Every face that was hidden; best first.
        data: Encoded bytes to store.
        format: Their format.
    """

    faces: Faces
    data: bytes
    format: str


class FacesStage:
    """Boxes and scores of faces, and images to store without them.

    All work is done in ``prepare``: images differ in size and cannot be batched, and one-thread sessions side by side
    in the decode threads are the fastest use of a CPU.
    """

    name: ClassVar[str] = "faces"
    version: ClassVar[int] = 1  # raise when the output for the same input changes
    writes: schema.Table = schema.FACES
    batch_size: int = 16

    def __init__(self, detector: FaceDetector, config: FacesConfig, images_limits: ImagesConfig) -> None:
        """Take the loaded model.

        Args:
            detector: Made with the thresholds and scales of ``config``.
            config: Margin and quality of what is re-encoded.
            images_limits: For decoding again what was decoded at a reduced scale.
        """
        self.config = config
        self._detector = detector
        self._limits = images_limits

    def prepare(self, image: ImageRow) -> HiddenFaces:
        """Detect, blur and encode, or strip the metadata of an image without faces.

        Raises:
            ImageError: The image cannot be decoded in full, or not be written.
        """
        info = images.inspect(image.data, self._limits)
        rgb_HW3 = image.rgb_HW3
        if rgb_HW3.shape[:2] != (info.height, info.width):
            rgb_HW3 = images.decode(image.data, self._limits)
        faces = self._detector.detect(rgb_HW3)
        if len(faces) == 0:
            data, stored_format = images.strip_metadata(image.data, info.format, self._limits, self.config.jpeg_quality)
            if stored_format == info.format or stored_format in images.LOSSLESS:
                return HiddenFaces(faces, data, stored_format)
            # Lossy anew: what is stored differs from what was searched.
            faces = self._detector.detect(images.decode(data, self._limits))
            if len(faces) == 0:
                return HiddenFaces(faces, data, stored_format)
        stored_format = "png" if info.format in images.LOSSLESS else "jpeg"
        return self._hide(rgb_HW3, faces, stored_format)

    def __call__(self, batch: Sequence[HiddenFaces]) -> Mapping[str, Any]:
        """Return ``num_faces``, ``face_boxes``, ``face_scores``, and ``stored``: (bytes, format) of each image.

        ``stored`` is no column: whoever writes the tar makes ``tar_offset``, ``stored_bytes`` and ``stored_format`` of
        it.
        """
        boxes = [[list(map(float, box)) for box in hidden.faces.boxes_N4] for hidden in batch]
        scores = [hidden.faces.scores_N for hidden in batch]
        return {
            "num_faces": pa.array([len(hidden.faces) for hidden in batch], type=schema.NUM_FACES.type),
            "face_boxes": pa.array(boxes, type=schema.FACE_BOXES.type),
            "face_scores": pa.array(scores, type=schema.FACE_SCORES.type),
            "stored": [(hidden.data, hidden.format) for hidden in batch],
        }

    def _hide(self, rgb_HW3: npt.NDArray[np.uint8], faces: Faces, stored_format: str) -> HiddenFaces:
        regions = [Region(box_4) for box_4 in faces.boxes_N4]
        for level in range(1, _MAX_ROUNDS):
            hidden_HW3 = hide(rgb_HW3, regions, self.config.margin)
            data = images.encode(hidden_HW3, stored_format, self.config.jpeg_quality)
            seen_HW3 = hidden_HW3 if stored_format == "png" else images.decode(data, self._limits)
            found = self._detector.detect(seen_HW3)
            if len(found) == 0:
                return HiddenFaces(faces, data, stored_format)
            regions, new = strengthened(regions, found, self.config.margin, level)
            faces = _merged(faces, new)
        hidden_HW3 = hide(rgb_HW3, regions, self.config.margin)
        return HiddenFaces(faces, images.encode(hidden_HW3, stored_format, self.config.jpeg_quality), stored_format)


def hide(rgb_HW3: npt.NDArray[np.uint8], regions: Sequence[Region], margin: float) -> npt.NDArray[np.uint8]:
    """Return a copy with an ellipse around each face blurred; no pixel outside of the regions changes.

    Args:
        rgb_HW3: Pixels, shape (H, W, 3), uint8.
        regions: Faces and how strongly each is hidden.
        margin: The ellipse's box exceeds the face's by this share of its width and height on each side.
    """
    hidden_HW3 = rgb_HW3.copy()
    height, width = rgb_HW3.shape[:2]
    # The strongest last, so that none is covered by a weaker neighbour.
    for region in sorted(regions, key=lambda region: region.level):
        left, top, right, bottom = _with_margin(region.box_4, margin)
        x0, y0 = max(0, math.floor(left)), max(0, math.floor(top))
        x1, y1 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
        if x0 >= x1 or y0 >= y1:
            continue
        blurred = _averaged(Image.fromarray(rgb_HW3[y0:y1, x0:x1]), region.level)
        # Pixels whose centre lies in the ellipse that touches the four sides.
        x_W = (np.arange(x0, x1) + 0.5 - (left + right) / 2) / max((right - left) / 2, 0.5)
        y_H = (np.arange(y0, y1) + 0.5 - (top + bottom) / 2) / max((bottom - top) / 2, 0.5)
        inside_HW = (x_W[None, :] ** 2 + y_H[:, None] ** 2 <= 1) | (region.level >= _FILL_LEVEL)
        np.copyto(hidden_HW3[y0:y1, x0:x1], np.asarray(blurred), where=inside_HW[:, :, None])
    return hidden_HW3


def strengthened(regions: Sequence[Region], found: Faces, margin: float, level: int) -> tuple[list[Region], Faces]:
    """Return the regions of the next round, and the faces among ``found`` that no region covered.

    A region that a found face touches goes up one level. The found face becomes a region too, at the highest level of
    those it touches or that of the round, whichever is more.
    """
    raised: set[int] = set()
    added: list[Region] = []
    new: list[int] = []
    covers = np.array([_with_margin(region.box_4, margin) for region in regions]).reshape(-1, 4)
    for index, box_4 in enumerate(found.boxes_N4):
        sides_N2 = np.minimum(covers[:, 2:], box_4[2:]) - np.maximum(covers[:, :2], box_4[:2])
        touched: list[int] = np.flatnonzero((sides_N2 > 0).all(axis=1)).tolist()
        raised.update(touched)
        shared = np.prod(np.clip(sides_N2, 0, None), axis=1).max(initial=0.0)
        if shared < 0.5 * float((box_4[2] - box_4[0]) * (box_4[3] - box_4[1])):
            new.append(index)
        needed = max([level, *(regions[row].level + 1 for row in touched)])
        added.append(Region(box_4, min(needed, _FILL_LEVEL)))
    levels = [min(region.level + (row in raised), _FILL_LEVEL) for row, region in enumerate(regions)]
    kept = [Region(region.box_4, raised_to) for region, raised_to in zip(regions, levels, strict=True)]
    return kept + added, Faces(found.boxes_N4[new], found.scores_N[new])


def _merged(faces: Faces, new: Faces) -> Faces:
    boxes_N4 = np.concatenate((faces.boxes_N4, new.boxes_N4))
    scores_N = np.concatenate((faces.scores_N, new.scores_N))
    order = np.lexsort((*(boxes_N4[:, column] for column in (3, 2, 1, 0)), -scores_N))
    return Faces(boxes_N4[order], scores_N[order])


def _with_margin(box_4: npt.NDArray[np.float32], margin: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side) for side in box_4)
    grow_x, grow_y = (right - left) * margin, (bottom - top) * margin
    return left - grow_x, top - grow_y, right + grow_x, bottom + grow_y


def _averaged(crop: Image.Image, level: int) -> Image.Image:
    cells = _CELLS[min(level, len(_CELLS) - 1)]
    per_px = cells / min(crop.size)
    grid = (max(1, round(crop.width * per_px)), max(1, round(crop.height * per_px)))
    # A crop smaller than its grid would survive: never more than one cell for each 2 x 2 pixels.
    grid = (min(grid[0], max(1, crop.width // 2)), min(grid[1], max(1, crop.height // 2)))
    return crop.resize(grid, Image.Resampling.BOX).resize(crop.size, Image.Resampling.BICUBIC)
