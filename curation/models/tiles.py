"""Cut a large picture into overlapping tiles, so that everything small is whole in one of them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_SLACK_PX = 8.0  # two tiles do not place a face at the same pixel: either may keep what is centred on their border

Area = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Tile:
    """A part of a picture.

    Attributes:
        core: What lies centred here is this tile's to find; cores do not overlap and cover the picture.
        seen: The core and its surroundings, within the picture.
    """

    core: Area
    seen: Area

    def owns(self, boxes_N4: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Return which boxes, in pixels of the picture, are centred in the core or next to it."""
        left, top, right, bottom = self.core
        x_N, y_N = (boxes_N4[:, 0] + boxes_N4[:, 2]) / 2, (boxes_N4[:, 1] + boxes_N4[:, 3]) / 2
        across = (x_N >= left - _SLACK_PX) & (x_N < right + _SLACK_PX)
        return np.asarray(across & (y_N >= top - _SLACK_PX) & (y_N < bottom + _SLACK_PX))

    def sees(self, boxes_N4: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return of which boxes, in pixels of the picture, a part is seen."""
        left, top, right, bottom = self.seen
        across = (boxes_N4[:, 2] > left) & (boxes_N4[:, 0] < right)
        return np.asarray(across & (boxes_N4[:, 3] > top) & (boxes_N4[:, 1] < bottom))


def tiles(width: int, height: int, side_px: int, context_px: int) -> list[Tile]:
    """Return tiles row by row that cover a picture.

    Args:
        width: Of the picture.
        height: Of the picture.
        side_px: The longest side of what a tile sees.
        context_px: A tile sees so much around its core, less at the border of the picture: what is centred in the
            core and at most twice as large is seen whole.

    Raises:
        ValueError: There is no room for a core.
    """
    core_px = side_px - 2 * context_px
    if core_px < 1 or context_px < 0:
        raise ValueError(f"tiles of {side_px} pixels have no room for {context_px} around a core")
    columns, rows = (_spans(length, core_px) for length in (width, height))
    return [
        Tile(
            (x0, y0, x1, y1),
            (
                max(0, x0 - context_px),
                max(0, y0 - context_px),
                min(width, x1 + context_px),
                min(height, y1 + context_px),
            ),
        )
        for y0, y1 in rows
        for x0, x1 in columns
    ]


def _spans(length: int, longest: int) -> list[tuple[int, int]]:
    """Return the fewest spans of nearly equal length that cover a line."""
    number = math.ceil(length / longest)
    return [(length * place // number, length * (place + 1) // number) for place in range(number)]
