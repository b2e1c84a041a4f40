"""Embeddings as dots: their first two principal components, drawn with NumPy and Pillow."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from curation.report.data import EmbeddingMap

Rows = npt.NDArray[np.floating[Any]]

WIDTH_PX, HEIGHT_PX = 960, 640
_SCALE = 2  # drawn larger and reduced, so that dots are round
_MARGIN_PX, _RADIUS_PX = 14, 1.8
# Told apart also by people who see fewer colours (Okabe and Ito, 2008); the first is for the pool, and they go round.
_COLOURS = ("#8a93a0", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_OUTLIERS_PERCENT = 0.5  # on each side lie at the border, so that one of them does not shrink all others to a dot


def embedding_map(samples: Mapping[str, Rows]) -> EmbeddingMap | None:
    """Return the picture; None where there are fewer than two points.

    Args:
        samples: Rows of each collection, all (n, dim); later ones are drawn over earlier ones.

    The sign of an axis is such that its largest loading is positive: equal rows give an equal picture.
    """
    rows_ND = np.concatenate([rows for rows in samples.values() if len(rows)] or [np.zeros((0, 0))])
    if len(rows_ND) < 2 or rows_ND.shape[1] < 2:
        return None
    points_N2, explained = principal_plane(rows_ND)
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(samples))]
    image = Image.new("RGB", (WIDTH_PX * _SCALE, HEIGHT_PX * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    pixels_N2, start, radius = _placed(points_N2), 0, _RADIUS_PX * _SCALE
    for colour, rows in zip(colours, samples.values(), strict=True):
        for x, y in pixels_N2[start : start + len(rows)].tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        start += len(rows)
    buffer = io.BytesIO()
    image.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
    legend = zip(samples, (len(rows) for rows in samples.values()), colours, strict=True)
    return EmbeddingMap(buffer.getvalue(), tuple(legend), explained)


def principal_plane(rows_ND: Rows) -> tuple[npt.NDArray[np.float64], float]:
    """Return coordinates along the first two principal components, (N, 2), and their share of the variance."""
    centred_ND = rows_ND.astype(np.float64)
    centred_ND -= centred_ND.mean(axis=0)
    variances_D, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    axes_D2 = axes_DD[:, :-3:-1]
    largest = np.take_along_axis(axes_D2, np.abs(axes_D2).argmax(axis=0)[None], axis=0)
    total = float(variances_D.clip(0).sum())
    return centred_ND @ (axes_D2 * np.where(largest < 0, -1, 1)), (
        float(variances_D[-2:].clip(0).sum()) / total if total else 0.0
    )


def _placed(points_N2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return pixels of the large picture; both axes have one scale each."""
    low, high = np.percentile(points_N2, [_OUTLIERS_PERCENT, 100 - _OUTLIERS_PERCENT], axis=0)
    unit_N2 = (points_N2.clip(low, high) - low) / np.where(high > low, high - low, 1)
    size = np.array([WIDTH_PX, HEIGHT_PX]) - 2 * _MARGIN_PX
    pixels_N2: npt.NDArray[np.float64] = (unit_N2 * [1, -1] + [0, 1]) * size * _SCALE + _MARGIN_PX * _SCALE
    return pixels_N2
