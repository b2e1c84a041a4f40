"""Find faces, blur them for good, and hand on images without metadata.

What is stored of an image comes from here. An image without faces keeps its coded pixels; only metadata goes. An image
with faces is encoded anew (a JPEG as its source was quantised, what was lossless losslessly), then searched again as it
will be stored, and mirrored: what is still found is hidden another way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import images, jpeg_coding, jpeg_edit, schema
from curation.config.images import FacesConfig, ImagesConfig
from curation.models.faces import FaceDetector, Faces, best_first
from curation.stage import ImageRow
from curation.stages.hiding import Region, hide, strengthened, with_margin

_MAX_ROUNDS = 7  # of hiding and searching again; of 32 crowd photos 24 took one, 1 two, 5 three, 2 more
_ALONE = 0.5  # a score at which one scale has found a hidden face again, whatever the others say
_OTHER_SCALES = (0.75, 1.5)  # at which hidden faces are searched too, where they fit
_FOUND_AGAIN = 0.4  # of the smaller box: a detection that covers so much of a hidden face has found it again


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
    version: ClassVar[int] = 4  # raise when the output for the same input changes
    writes: schema.Table = schema.FACES
    batch_size: int = 16
    min_side_px: int | None = None

    def __init__(self, detector: FaceDetector, config: FacesConfig, images_limits: ImagesConfig) -> None:
        """Take the loaded model.

        Args:
            detector: Made with the thresholds and scales of ``config``.
            config: Margin, and quality of what is re-encoded and was no JPEG.
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
            stripped = images.stripped(image.data, info.format, self._limits)
            if stripped is not None:
                return HiddenFaces(faces, stripped, info.format)
            data, stored_format = images.encode_like(rgb_HW3, info.format, self.config.jpeg_quality)
            if stored_format in images.LOSSLESS:
                return HiddenFaces(faces, data, stored_format)
            # Lossy anew: what is stored differs from what was searched.
            faces = self._detector.detect(images.decode(data, self._limits))
            if len(faces) == 0:
                return HiddenFaces(faces, data, stored_format)
        return self._hide(rgb_HW3, faces, _writer(image.data, info.format, rgb_HW3, self.config.jpeg_quality))

    def blurred(self, image: ImageRow) -> npt.NDArray[np.uint8]:
        """Return the pixels that would be stored of an image; those it has where there are no faces.

        Raises:
            ImageError: As ``prepare``.
        """
        hidden = self.prepare(image)
        return images.decode(hidden.data, self._limits) if len(hidden.faces) else image.rgb_HW3

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

    def _hide(self, rgb_HW3: npt.NDArray[np.uint8], faces: Faces, writer: "_Writer") -> HiddenFaces:
        regions = [Region(box_4) for box_4 in faces.boxes_N4]
        near_M4 = None
        for level in range(1, _MAX_ROUNDS):
            data = writer.encode(rgb_HW3, hide(rgb_HW3, regions, self.config.margin))
            found = self._found_again(data, regions, near_M4)
            if len(found) == 0:
                return HiddenFaces(faces, data, writer.format)
            before = regions
            regions, new = strengthened(before, found, self.config.margin, level)
            near_M4 = _changed(before, regions, self.config.margin)
            faces = _merged(faces, new)
        return HiddenFaces(faces, writer.encode(rgb_HW3, hide(rgb_HW3, regions, self.config.margin)), writer.format)

    def _found_again(
        self, data: bytes, regions: Sequence[Region], near_M4: npt.NDArray[np.float32] | None = None
    ) -> Faces:
        """Return what would be found in stored bytes, and what of a hidden face is still found some other way.

        That is by any one scale alone, in the mirrored image, or at scales that the search for faces does not use.

        Args:
            data: The stored bytes.
            regions: What is hidden in them.
            near_M4: What has changed since they were searched last; of a large image nothing else is searched.
        """
        rgb_HW3 = images.decode(data, self._limits)
        width = rgb_HW3.shape[1]
        mirrored_M4 = None if near_M4 is None else _mirrored_boxes(near_M4, width)
        found, alone = self._detector.detect_twice(rgb_HW3, _ALONE, near_M4)
        again = [alone, self._detector.detect_alone(rgb_HW3, _OTHER_SCALES, _ALONE)]
        turned_HW3 = np.ascontiguousarray(rgb_HW3[:, ::-1])
        turned = [
            *self._detector.detect_twice(turned_HW3, _ALONE, mirrored_M4),
            self._detector.detect_alone(turned_HW3, _OTHER_SCALES, _ALONE),
        ]
        again += [_mirrored(faces, width) for faces in turned]
        for faces in again:
            is_new = np.zeros(len(faces), dtype=bool)
            for region in regions:
                is_new |= _covered(region.box_4, faces.boxes_N4)
            for box_4 in found.boxes_N4:
                is_new &= ~_covered(box_4, faces.boxes_N4)
            found = _merged(found, Faces(faces.boxes_N4[is_new], faces.scores_N[is_new]))
        return found


def _changed(before: Sequence[Region], after: Sequence[Region], margin: float) -> npt.NDArray[np.float32]:
    """Return the areas of regions that are hidden otherwise than before, or are new; shape (M, 4)."""
    levels = [region.level for region in before] + [-1] * (len(after) - len(before))
    changed = [region for region, level in zip(after, levels, strict=True) if region.level != level]
    return np.array([with_margin(region.box_4, margin) for region in changed], np.float32).reshape(-1, 4)


def _mirrored_boxes(boxes_N4: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    left_N, top_N, right_N, bottom_N = boxes_N4.T
    return np.stack((width - right_N, top_N, width - left_N, bottom_N), axis=1)


def _mirrored(faces: Faces, width: int) -> Faces:
    return Faces(_mirrored_boxes(faces.boxes_N4, width), faces.scores_N)


@dataclass(frozen=True)
class FaceAudit:
    """What a detector still finds in one stored image.

    Attributes:
        num_hidden: Hidden faces that were asked about.
        num_found_again: Those of them that a detection covers.
        found: Everything that is detected, whether or not it was hidden.
    """

    num_hidden: int
    num_found_again: int
    found: Faces


def audit_faces(
    detector: FaceDetector,
    data: bytes,
    boxes_N4: npt.NDArray[np.float32],
    limits: ImagesConfig,
    min_side_px: float = 20.0,
) -> FaceAudit:
    """Search a stored image again.

    Args:
        detector: May differ from the one that found the faces.
        data: Bytes from the blurred tar.
        boxes_N4: Its ``face_boxes``, or boxes that people drew; shape (N, 4).
        limits: For decoding.
        min_side_px: Faces with a shorter side are left out of both counts.

    Raises:
        ImageError: The bytes cannot be decoded.
    """
    found = detector.detect(images.decode(data, limits))
    boxes_N4 = np.asarray(boxes_N4, dtype=np.float32).reshape(-1, 4)
    asked_N4 = boxes_N4[(boxes_N4[:, 2:] - boxes_N4[:, :2]).min(axis=1, initial=np.inf) >= min_side_px]
    again = [bool(_covered(box_4, found.boxes_N4).any()) for box_4 in asked_N4]
    return FaceAudit(len(asked_N4), sum(again), found)


def _covered(box_4: npt.NDArray[np.float32], others_M4: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    sides_M2 = np.minimum(box_4[2:], others_M4[:, 2:]) - np.maximum(box_4[:2], others_M4[:, :2])
    areas_M = np.prod(others_M4[:, 2:] - others_M4[:, :2], axis=1)
    smaller_M = np.minimum(areas_M, np.prod(box_4[2:] - box_4[:2]))
    return np.asarray(np.prod(np.clip(sides_M2, 0, None), axis=1) >= _FOUND_AGAIN * smaller_M)


@dataclass(frozen=True)
class _Writer:
    """How an image with hidden faces is encoded: like its source."""

    format: str
    quality: int
    coding: jpeg_coding.JpegCoding | None
    planes: list[jpeg_edit.Plane]

    def encode(self, rgb_HW3: npt.NDArray[np.uint8], hidden_HW3: npt.NDArray[np.uint8]) -> bytes:
        if self.coding is None:
            return images.encode(hidden_HW3, self.format, self.quality)
        return jpeg_edit.encode_edited(self.planes, rgb_HW3, hidden_HW3, self.coding)


def _writer(data: bytes, source_format: str, rgb_HW3: npt.NDArray[np.uint8], quality: int) -> _Writer:
    if source_format in images.LOSSLESS or (source_format == "webp" and _is_lossless_webp(data)):
        return _Writer("png", quality, None, [])
    coding = jpeg_coding.coding_of(data) if source_format == "jpeg" else None
    planes = [] if coding is None else jpeg_edit.source_planes(data, rgb_HW3, coding)
    return _Writer("jpeg", quality, coding, planes)


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first picture is coded without loss: RIFF chunks of type (4), length (4), payload, padded to even."""
    position = 12
    while position + 8 <= len(data):
        kind = data[position : position + 4]
        if kind in (b"VP8L", b"VP8 ", b"ANMF"):
            return kind == b"VP8L"
        position += 8 + int.from_bytes(data[position + 4 : position + 8], "little")
        position += position % 2
    return False


def _merged(faces: Faces, new: Faces) -> Faces:
    boxes_N4 = np.concatenate((faces.boxes_N4, new.boxes_N4))
    scores_N = np.concatenate((faces.scores_N, new.scores_N))
    order = best_first(boxes_N4, scores_N)
    return Faces(boxes_N4[order], scores_N[order])
