"""A plot of precision and recall over thresholds, drawn with Pillow: no plotting library for one picture."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 1500, 640
_PANEL = (640, 470)  # px
_LEFT, _TOP, _GAP = 70, 80, 90
_INK, _GRID = (40, 40, 40), (225, 225, 225)

Line = npt.NDArray[np.float64]


def plot(
    path: Path,
    thresholds: Line,
    recalls: Mapping[str, Line],
    precision: tuple[Line, Line, Line],
    recall: tuple[Line, Line, Line],
    suggested: float | None,
    title: str,
) -> None:
    """Write a PNG: recall of each edit on the left, precision and recall of all copies on the right.

    Args:
        path: The file.
        thresholds: Ascending, (T,).
        recalls: By edit, (T,) each, in [0, 1]; NaN where there is none.
        precision: Lower end of its interval, itself, upper end.
        recall: The same.
        suggested: A threshold to mark.
        title: First line.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 18), title, _INK, _font(20))
    left, right = _LEFT, _LEFT + _PANEL[0] + _GAP
    for x, name in ((left, "recall of each edit"), (right, "all copies, with 95 % intervals")):
        _axes(draw, x, thresholds, name)
    for (name, values), colour in zip(recalls.items(), _colours(len(recalls)), strict=True):
        _line(draw, left, thresholds, values, colour)
        place = list(recalls).index(name)
        draw.text((left + 12, _TOP + 196 + 15 * place), name, colour, _font(13))
    for (low, values, high), colour, name, place in (
        (precision, (30, 90, 190), "precision", 0),
        (recall, (190, 70, 30), "recall", 1),
    ):
        _line(draw, right, thresholds, low, _paler(colour))
        _line(draw, right, thresholds, high, _paler(colour))
        _line(draw, right, thresholds, values, colour, width=3)
        draw.text((right + 12, _TOP + 200 + 20 * place), name, colour, _font(16))
    if suggested is not None:
        for x in (left, right):
            at = _x(x, thresholds, suggested)
            draw.line((at, _TOP, at, _TOP + _PANEL[1]), fill=(20, 140, 60), width=2)
        draw.text((at + 6, _TOP + 4), f"{suggested:.2f}", (20, 140, 60), _font(16))
    image.save(path)


def _axes(draw: ImageDraw.ImageDraw, left: int, thresholds: Line, name: str) -> None:
    width, height = _PANEL
    draw.text((left, _TOP - 26), name, _INK, _font(16))
    for share in np.linspace(0, 1, 6):
        y = _y(float(share))
        draw.line((left, y, left + width, y), fill=_GRID)
        draw.text((left - 36, y - 8), f"{share:.1f}", _INK, _font(13))
    for value in np.arange(np.ceil(thresholds[0] * 10), np.floor(thresholds[-1] * 10) + 1) / 10:
        x = _x(left, thresholds, float(value))
        draw.line((x, _TOP, x, _TOP + height), fill=_GRID)
        draw.text((x - 8, _TOP + height + 6), f"{value:.1f}", _INK, _font(13))
    draw.rectangle((left, _TOP, left + width, _TOP + height), outline=_INK)
    draw.text((left + width // 2 - 40, _TOP + height + 28), "threshold", _INK, _font(14))


def _line(
    draw: ImageDraw.ImageDraw,
    left: int,
    thresholds: Line,
    values: Line,
    colour: tuple[int, int, int],
    width: int = 2,
) -> None:
    points = [
        (_x(left, thresholds, float(threshold)), _y(float(value)))
        for threshold, value in zip(thresholds, values, strict=True)
        if np.isfinite(value)
    ]
    if len(points) > 1:
        draw.line(points, fill=colour, width=width)


def _x(left: int, thresholds: Line, value: float) -> float:
    return float(left + (value - thresholds[0]) / (thresholds[-1] - thresholds[0]) * _PANEL[0])


def _y(share: float) -> float:
    return _TOP + (1 - share) * _PANEL[1]


def _colours(number: int) -> Sequence[tuple[int, int, int]]:
    """Return hues that follow each other far apart, so that neighbours in the legend differ."""
    hues = [(place * 0.381966) % 1 for place in range(number)]
    shares = [colorsys.hsv_to_rgb(hue, 0.85, 0.45 + 0.3 * (place % 2)) for place, hue in enumerate(hues)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in shares]


def _paler(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return (colour[0] + 255) // 2, (colour[1] + 255) // 2, (colour[2] + 255) // 2


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
