"""Pictures of what patches and heads see, as PNG: attention of the class token, principal components of patches."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from curation.dinov2.checkpoint import clear_errors
from curation.dinov2.evaluate.backbones import Backbone

Pixels = npt.NDArray[np.uint8]
_GAP_PX = 2
_NUM_COMPONENTS = 3  # red, green, blue
_OUTER = 0.01  # of the values are drawn as black, and of white, so that one patch does not darken all others


def attention_picture(backbone: Backbone, pixels_NHW3: Pixels, cell_px: int) -> Pixels | None:
    """Return a row an image: itself, the mean of the last block's heads, then each head. None where it has none.

    Brightness is attention of the class token to a patch, 0 black, the most of that map white.
    """
    attention_NHP = backbone.attention(torch.from_numpy(pixels_NHW3))
    if attention_NHP is None:
        return None
    rows = []
    for pixels, maps_HP in zip(pixels_NHW3, attention_NHP.cpu(), strict=True):
        side = pixels.shape[0] // backbone.patch_px
        cells = [_enlarged(pixels, cell_px)]
        for map_P in [maps_HP.mean(dim=0), *maps_HP]:
            scaled = (map_P / map_P.max().clamp(min=1e-12)).view(side, side, 1).expand(-1, -1, 3)
            cells.append(_enlarged(_bytes(scaled), cell_px))
        rows.append(cells)
    return grid(rows)


def components_picture(backbone: Backbone, pixels_NHW3: Pixels, cell_px: int) -> Pixels | None:
    """Return a row an image: itself, and its patches with the first three components as red, green and blue.

    Components are those of the patches of all images together, so equal colours mean equal content across images.
    None where the backbone has no patches.
    """
    patches_NPD = backbone(torch.from_numpy(pixels_NHW3), 1)[-1].patches_NPD
    if patches_NPD is None:
        return None
    side = math.isqrt(patches_NPD.shape[1])
    colours_NP3 = components(patches_NPD.float().cpu().flatten(0, 1)).view(len(pixels_NHW3), -1, 3)
    return grid(
        [
            [_enlarged(pixels, cell_px), _enlarged(_bytes(colours_P3.view(side, side, 3)), cell_px)]
            for pixels, colours_P3 in zip(pixels_NHW3, colours_NP3, strict=True)
        ]
    )


def components(x_ND: Tensor) -> Tensor:
    """Return the first three principal components of the rows, each stretched to [0, 1]; (N, 3).

    A component's sign is chosen so that its largest weight is positive: pictures of two runs can be compared.
    """
    centred = x_ND.double() - x_ND.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes_D3 = vectors[:, -_NUM_COMPONENTS:].flip(1)
    largest = axes_D3.gather(0, axes_D3.abs().argmax(dim=0, keepdim=True))
    projected = centred @ (axes_D3 * largest.sign())
    low, high = (torch.quantile(projected, q, dim=0) for q in (_OUTER, 1 - _OUTER))
    stretched: Tensor = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return stretched


def grid(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Return equal cells as one picture, row by row, on white."""
    height, width = rows[0][0].shape[:2]
    columns = len(rows[0])
    shape = (len(rows) * (height + _GAP_PX) - _GAP_PX, columns * (width + _GAP_PX) - _GAP_PX, 3)
    picture = np.full(shape, 255, dtype=np.uint8)
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            top, left = row * (height + _GAP_PX), column * (width + _GAP_PX)
            picture[top : top + height, left : left + width] = cell
    return picture


def write_png(path: Path, picture: Pixels) -> None:
    """Write a PNG.

    Raises:
        DiskFullError: It does not fit.
        TrainError: It cannot be written.
    """
    with clear_errors(path, path.name):
        Image.fromarray(picture).save(path, "PNG")


def _bytes(values: Tensor) -> Pixels:
    """Return values in [0, 1] as 8 bits."""
    rounded: Pixels = np.rint(values.numpy() * 255).astype(np.uint8)
    return rounded


def _enlarged(pixels: Pixels, side_px: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.NEAREST), dtype=np.uint8)
