"""Hide faces in pixels: an ellipse around each, averaged into one colour; what is found again is filled otherwise.

What is left within an ellipse cannot be computed back: the mean colour of the face, then only what its rim has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from curation.models.faces import Faces

# How much is averaged grows with the face, so what is left does not: one colour. Averages of 4 x 4 and 2 x 2 parts were
# found again in 3 to 6 % of faces by each scale, or mirrored picture, that the search for faces does not use.
_MEAN, _RIM, _DARK, _LIGHT, _OPPOSITE = range(5)  # levels; the later ones are for ellipses that still make a head
LAST_LEVEL = _OPPOSITE
_TOUCHED = 0.4  # of the smaller of region and found face
_RIM_POINTS, _RIM_WAVES = 64, 6
# The outermost share of the ellipse fades from hidden to untouched: JPEG blocks that a hard edge crosses suffer more.
_FADE = 0.15


@dataclass(frozen=True)
class Region:
    """A face to hide.

    Attributes:
        box_4: Left, top, right, bottom in pixels, as detected.
        level: What fills the ellipse. 0: the mean colour of its box; 1: the colours of the rim, carried on inwards; 2:
            a quarter of the rim's mean colour; 3: the same, as far from white; 4: the opposite of that colour.
    """

    box_4: npt.NDArray[np.float32]
    level: int = 0


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
        left, top, right, bottom = with_margin(region.box_4, margin)
        x0, y0 = max(0, math.floor(left)), max(0, math.floor(top))
        x1, y1 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
        if x0 >= x1 or y0 >= y1:
            continue
        # Distance of pixel centres from the middle; 1 on the ellipse that touches the four sides.
        x_W = (np.arange(x0, x1) + 0.5 - (left + right) / 2) / max((right - left) / 2, 0.5)
        y_H = (np.arange(y0, y1) + 0.5 - (top + bottom) / 2) / max((bottom - top) / 2, 0.5)
        radius_HW = np.sqrt(x_W[None, :] ** 2 + y_H[:, None] ** 2)
        share_HW1 = np.clip((1 - radius_HW) / _FADE, 0, 1)[:, :, None]
        if region.level == _MEAN:
            filled = rgb_HW3[y0:y1, x0:x1].mean(axis=(0, 1))
        else:
            rim_P3 = _rim(hidden_HW3, (left, top, right, bottom))
            if region.level == _RIM:
                angle_HW = np.arctan2(y_H[:, None], x_W[None, :])
                filled = _carried_in(rim_P3, np.minimum(radius_HW, 1), angle_HW)
            else:
                filled = _unlike(rim_P3.mean(axis=0), region.level)
        view_HW3 = hidden_HW3[y0:y1, x0:x1]
        view_HW3[...] = np.rint(view_HW3 + share_HW1 * (filled - view_HW3))
    return hidden_HW3


def strengthened(regions: Sequence[Region], found: Faces, margin: float, level: int) -> tuple[list[Region], Faces]:
    """Return the regions of the next round, and the faces among ``found`` that no region covered.

    A region that shares a good part with a found face goes up one level. A found face that lies mostly outside of all
    regions, or that their last level did not hide, becomes a region of its own at the level of the round.
    """
    raised: set[int] = set()
    new: list[int] = []
    covers = np.array([with_margin(region.box_4, margin) for region in regions]).reshape(-1, 4)
    for index, box_4 in enumerate(found.boxes_N4):
        sides_N2 = np.minimum(covers[:, 2:], box_4[2:]) - np.maximum(covers[:, :2], box_4[:2])
        shared_N = np.prod(np.clip(sides_N2, 0, None), axis=1)
        areas_N = np.prod(covers[:, 2:] - covers[:, :2], axis=1)
        area = float(np.prod(box_4[2:] - box_4[:2]))
        # Neighbours in a crowd touch; only a region that holds a good part of what was found can be its cause.
        touched: list[int] = np.flatnonzero(shared_N >= _TOUCHED * np.minimum(areas_N, area)).tolist()
        is_outside = not touched or shared_N.max() < 0.5 * area
        if is_outside or all(regions[row].level >= LAST_LEVEL for row in touched):
            new.append(index)
        raised.update(touched)
    levels = [min(region.level + (row in raised), LAST_LEVEL) for row, region in enumerate(regions)]
    kept = [Region(region.box_4, raised_to) for region, raised_to in zip(regions, levels, strict=True)]
    added = [Region(found.boxes_N4[index], min(level, LAST_LEVEL)) for index in new]
    return kept + added, Faces(found.boxes_N4[new], found.scores_N[new])


def with_margin(box_4: npt.NDArray[np.float32], margin: float) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of a box that is larger by ``margin`` of its width and height on each side."""
    left, top, right, bottom = (float(side) for side in box_4)
    grow_x, grow_y = (right - left) * margin, (bottom - top) * margin
    return left - grow_x, top - grow_y, right + grow_x, bottom + grow_y


def _unlike(rim_3: npt.NDArray[np.float64], level: int) -> npt.NDArray[np.float64]:
    """Return one colour that stands out from that of the rim, another at each level."""
    return {_DARK: rim_3 / 4, _LIGHT: 255 - (255 - rim_3) / 4, _OPPOSITE: 255 - rim_3}[level]


def _rim(rgb_HW3: npt.NDArray[np.uint8], box: tuple[float, float, float, float]) -> npt.NDArray[np.float64]:
    """Return the colours around the ellipse in a box, at equal steps of its angle; shape (_RIM_POINTS, 3)."""
    left, top, right, bottom = box
    angles_P = np.arange(_RIM_POINTS) * 2 * np.pi / _RIM_POINTS
    x_P = (left + right) / 2 + ((right - left) / 2 + 1) * np.cos(angles_P)
    y_P = (top + bottom) / 2 + ((bottom - top) / 2 + 1) * np.sin(angles_P)
    height, width = rgb_HW3.shape[:2]
    columns_P, rows_P = np.clip(x_P, 0, width - 1).astype(np.int64), np.clip(y_P, 0, height - 1).astype(np.int64)
    return rgb_HW3[rows_P, columns_P].astype(np.float64)


def _carried_in(
    rim_P3: npt.NDArray[np.float64], radius_HW: npt.NDArray[np.float64], angle_HW: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the harmonic function on the unit disc with (the low frequencies of) these values on its rim."""
    waves_W3 = np.fft.rfft(rim_P3, axis=0)[: _RIM_WAVES + 1] / len(rim_P3)
    inside_HW3 = np.broadcast_to(waves_W3[0].real, (*radius_HW.shape, 3)).copy()
    for number in range(1, _RIM_WAVES + 1):
        wave_HW = 2 * radius_HW**number * np.exp(1j * number * angle_HW)
        inside_HW3 += (wave_HW[:, :, None] * waves_W3[number]).real
    return np.asarray(np.clip(inside_HW3, 0, 255))
