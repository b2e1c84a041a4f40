"""Views of one image: random resized crops and flips on 8-bit pixels, on the CPU.

Colour, blur and normalisation follow batched on the device (``curation.dinov2.colour``).

Source:
    Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments" (multi-crop).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.dinov2.config import CropsConfig
from curation.dinov2.randomness import Purpose, generator

ATTEMPTS = 10
NUM_GLOBAL = 2

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Views:
    """The crops of one image, uint8.

    Attributes:
        global_V3HW: The two global crops.
        local_V3HW: The local crops; no rows where there are none.
    """

    global_V3HW: Pixels
    local_V3HW: Pixels


def multi_crop(rgb_HW3: Pixels, seed: int, position: int, config: CropsConfig) -> Views:
    """Return the views of the sample at a global position.

    Args:
        rgb_HW3: Upright pixels.
        seed: Seed of the run.
        position: Global position of the sample; with the seed it decides every crop.
        config: Sizes and probabilities.
    """
    image = Image.fromarray(rgb_HW3)
    crops = []
    for crop in range(NUM_GLOBAL + config.num_local):
        is_global = crop < NUM_GLOBAL
        rng = generator(seed, Purpose.CROP, position, crop)
        box = crop_box(rng, image.size, config.global_scale if is_global else config.local_scale, config.aspect)
        pixels = resized(image, box, config.global_px if is_global else config.local_px)
        crops.append(pixels[:, :, ::-1] if rng.random() < config.flip_p else pixels)
    local = crops[NUM_GLOBAL:]
    empty = np.zeros((0, 3, config.local_px, config.local_px), dtype=np.uint8)
    return Views(global_V3HW=np.stack(crops[:NUM_GLOBAL]), local_V3HW=np.stack(local) if local else empty)


def crop_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop.

    Args:
        rng: Draws area (uniform), aspect (log-uniform) and place.
        size: Width and height of the image, pixels.
        scale: Share of the image's area, from and to.
        aspect: Width / height, from and to.

    Returns:
        A box inside the image; after ten failures the central one whose aspect is nearest.
    """
    width, height = size
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(rng.integers(0, width - crop_width + 1)), int(rng.integers(0, height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    ratio = min(max(width / height, aspect[0]), aspect[1])
    crop_width = min(width, max(1, round(height * ratio)))
    crop_height = min(height, max(1, round(width / ratio)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resized(image: Image.Image, box: tuple[int, int, int, int], side_px: int) -> Pixels:
    """Return the box as a square, (3, side, side), bicubic with antialiasing; no pixel outside the box counts."""
    square = image.crop(box).resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)
