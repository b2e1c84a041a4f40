"""Views of one image: random resized crops and flips on 8-bit pixels, on the CPU.

Colour, blur and normalisation follow batched on the device (``curation.dinov2.colour``).

Source:
    Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments" (multi-crop).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from curation.dinov2.config import CropsConfig
from curation.dinov2.randomness import Purpose, generator

ATTEMPTS = 10
NUM_GLOBAL = 2
_DRAWS_AN_ATTEMPT = 4  # area, aspect, left, top
_REDUCTIONS = (8, 4, 2)  # of libjpeg

Pixels = npt.NDArray[np.uint8]
Draws = npt.NDArray[np.float64]
Boxes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """The crops of one image, uint8.

    Attributes:
        global_V3HW: The two global crops.
        local_V3HW: The local crops; no rows where there are none.
    """

    global_V3HW: Pixels
    local_V3HW: Pixels


def draw(seed: int, position: int, config: CropsConfig) -> Draws:
    """Return the random numbers of all crops of the sample at a global position, (crops, 41) in [0, 1)."""
    shape = (NUM_GLOBAL + config.num_local, ATTEMPTS * _DRAWS_AN_ATTEMPT + 1)
    return generator(seed, Purpose.CROP, position).random(shape)


def multi_crop(rgb_HW3: Pixels, draws: Draws, config: CropsConfig, views: Views | None = None) -> Views:
    """Return the views of a sample.

    Args:
        rgb_HW3: Upright pixels.
        draws: Numbers of its crops.
        config: Sizes and probabilities.
        views: Written to and returned; None: new ones.
    """
    height, width, _ = rgb_HW3.shape
    if views is None:
        views = Views(
            np.empty((NUM_GLOBAL, 3, config.global_px, config.global_px), dtype=np.uint8),
            np.empty((config.num_local, 3, config.local_px, config.local_px), dtype=np.uint8),
        )
    flips = draws[:, -1] < config.flip_p
    crops = (*views.global_V3HW, *views.local_V3HW)
    for out_3HW, box, flip in zip(crops, _boxes((width, height), draws, config), flips, strict=True):
        out_3HW[...] = resized(rgb_HW3, tuple(box), out_3HW.shape[-1], flip=flip)
    return views


def reduced_side(size: tuple[int, int], draws: Draws, config: CropsConfig) -> int | None:
    """Return the short side that a JPEG may be decoded to: no crop then has fewer pixels than its own side.

    Args:
        size: Width and height in full, pixels.
        draws: Numbers of its crops.
        config: Sizes of the crops.

    Returns:
        A half, quarter or eighth of the short side; None where some crop needs all pixels.
    """
    sides_px = np.full(len(draws), config.local_px)
    sides_px[:NUM_GLOBAL] = config.global_px
    scale_V2 = _scales(config)
    # The shorter side of a crop is at most that of a square of its area.
    if (math.prod(size) * scale_V2[:, 1] < (_REDUCTIONS[-1] * sides_px) ** 2).any():
        return None
    left, top, right, bottom = _boxes(size, draws, config).T
    spare = (np.minimum(right - left, bottom - top) / sides_px).min()
    return next((min(size) // factor for factor in _REDUCTIONS if factor <= spare), None)


def _boxes(size: tuple[int, int], draws: Draws, config: CropsConfig) -> Boxes:
    attempts_VA4 = draws[:, :-1].reshape(len(draws), ATTEMPTS, _DRAWS_AN_ATTEMPT)
    return crop_boxes(attempts_VA4, size, _scales(config), config.aspect)


def _scales(config: CropsConfig) -> Draws:
    return np.array([config.global_scale] * NUM_GLOBAL + [config.local_scale] * config.num_local)


def crop_boxes(draws_VA4: Draws, size: tuple[int, int], scale_V2: Draws, aspect: tuple[float, float]) -> Boxes:
    """Return left, top, right and bottom of random crops, (V, 4).

    Args:
        draws_VA4: Numbers in [0, 1) of each attempt: area (uniform), aspect (log-uniform), left and top.
        size: Width and height of the image, pixels.
        scale_V2: Share of the image's area, from and to.
        aspect: Width / height, from and to.

    Returns:
        Boxes inside the image: of the first attempt that fits, and after ten failures the central one whose aspect is
        nearest.
    """
    whole = np.array(size)
    low, high = scale_V2.T[..., np.newaxis]
    area = whole.prod() * (low + (high - low) * draws_VA4[..., 0])
    ratio = np.exp(np.log(aspect[0]) + np.log(aspect[1] / aspect[0]) * draws_VA4[..., 1])
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=-1))).astype(np.int64)
    fits = ((sides > 0) & (sides <= whole)).all(axis=-1)
    first = fits.argmax(axis=1)[:, np.newaxis, np.newaxis]
    chosen, place = (np.take_along_axis(numbers, first, axis=1)[:, 0] for numbers in (sides, draws_VA4[..., 2:]))
    corner = (place * (whole - chosen + 1)).astype(np.int64)
    boxes = np.concatenate([corner, corner + chosen], axis=1)
    boxes[~fits.any(axis=1)] = _central_box(size, aspect)
    return boxes


def _central_box(size: tuple[int, int], aspect: tuple[float, float]) -> tuple[int, int, int, int]:
    width, height = size
    ratio = min(max(width / height, aspect[0]), aspect[1])
    crop_width = min(width, max(1, round(height * ratio)))
    crop_height = min(height, max(1, round(width / ratio)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resized(rgb_HW3: Pixels, box: tuple[int, ...], side_px: int, *, flip: bool = False) -> Pixels:
    """Return the box (left, top, right, bottom) as a square, (3, side, side), bicubic with antialiasing.

    No pixel outside the box counts. PyTorch's 8-bit path takes a fifth of Pillow's time, and is at most one grey level
    from it.
    """
    left, top, right, bottom = box
    crop = torch.from_numpy(np.ascontiguousarray(rgb_HW3[top:bottom, left:right])).permute(2, 0, 1).unsqueeze(0)
    square = functional.interpolate(crop, size=(side_px, side_px), mode="bicubic", antialias=True)[0]
    pixels: Pixels = (square.flip(-1) if flip else square).numpy()
    return pixels
