"""Which patches of the global crops the student does not see.

Blocks are drawn as in BEiT and iBOT, but every mask ends with exactly the number of patches that was asked for, so the
number of masked patches in a batch is the same in each step and shapes stay constant. The published code's way is
there too: a mask ends after ten failed attempts, often with fewer patches, and its share is drawn, not evenly spaced.
"""

import math
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from curation.dinov2.config import LossesConfig
from curation.dinov2.randomness import Purpose, generator, scores

MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT = (0.3, 1 / 0.3)
ATTEMPTS = 10

Mask = npt.NDArray[np.bool_]


@lru_cache(maxsize=8)
def mask_counts(num_crops: int, num_patches: int, share: float, ratio: tuple[float, float]) -> tuple[int, ...]:
    """Return how many patches are masked in each masked crop: ratios spread evenly over the range.

    At least one crop is masked, and each mask hides at least one patch.
    """
    num_masked = max(1, int(num_crops * share))
    low, high = ratio
    ratios = [low + (high - low) * (i + 0.5) / num_masked for i in range(num_masked)]
    return tuple(min(num_patches - 1, max(1, round(num_patches * r))) if num_patches > 1 else 1 for r in ratios)


def batch_masks(
    seed: int,
    step: int,
    batch_size: int,
    grid: tuple[int, int],
    config: LossesConfig,
    images: range | None = None,
) -> Mask:
    """Return the masks of the two global crops of the images of a batch, (2B, P) bool, crop-major.

    Which crops are masked, and how much, is a random ranking of all crops of the step; where the blocks lie depends on
    the sample and crop alone.

    Args:
        seed: Seed of the run.
        step: Zero-based.
        batch_size: Images of the whole step.
        grid: Rows and columns of patches.
        config: Shares and ratios.
        images: Places in the batch whose masks are wanted; None: all.
    """
    rows, columns = grid
    wanted = range(batch_size) if images is None else images
    masks = np.zeros((2 * len(wanted), rows * columns), dtype=bool)
    if not config.masked_share:
        return masks
    positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
    ranking = np.argsort(
        np.concatenate([scores(seed, Purpose.MASK_SHARE, crop, positions) for crop in (0, 1)]), kind="stable"
    )
    counts = mask_counts(2 * batch_size, rows * columns, config.masked_share, config.mask_ratio)
    crop_of, image_of = np.divmod(ranking[: len(counts)], batch_size)
    for place in np.flatnonzero((image_of >= wanted.start) & (image_of < wanted.stop)).tolist():
        crop, image = int(crop_of[place]), int(image_of[place])
        rng = generator(seed, Purpose.MASK_BLOCKS, int(positions[image]), crop)
        if config.mask_count == "exact":
            mask = block_mask(rng, grid, counts[place])
        else:
            low, high = config.mask_ratio
            share = low + (high - low) * (place + rng.random()) / len(counts)
            mask = reference_mask(_Generator(rng), grid, int(rows * columns * share))
        masks[crop * len(wanted) + image - wanted.start] = mask.reshape(-1)
    return masks


def block_mask(rng: np.random.Generator, grid: tuple[int, int], count: int) -> Mask:
    """Return a (rows, columns) mask of exactly ``count`` patches made of rectangles, the last patches grown at edges.

    Source:
        Bao et al. 2021, "BEiT: BERT pre-training of image transformers", algorithm 1.
    """
    mask = np.zeros(grid, dtype=bool)
    remaining = count
    while remaining > 0:
        added = _add_block(rng, mask, remaining)
        if added == 0:
            break
        remaining -= added
    for _ in range(remaining):
        edge = np.flatnonzero(_edge(mask)) if mask.any() else np.arange(mask.size)
        mask.reshape(-1)[rng.choice(edge)] = True
    return mask


class Numbers(Protocol):
    """Where the published masks take their numbers from."""

    def uniform(self, low: float, high: float) -> float:
        """Return a number between two bounds in any order."""

    def randint(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``, both included."""


class _Generator:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._rng.random()

    def randint(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))


def reference_mask(numbers: Numbers, grid: tuple[int, int], requested: int) -> Mask:
    """Return a (rows, columns) mask of at most ``requested`` patches, draw by draw as the published trainer makes it.

    Source:
        ``dinov2/data/masking.py`` of the published code, described by its draws.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    masked, is_growing = 0, True
    while masked < requested and is_growing:
        remaining = min(requested - masked, mask.size // 2)
        is_growing = False
        for _ in range(ATTEMPTS):
            area = numbers.uniform(MIN_BLOCK_PATCHES, remaining)
            aspect = math.exp(numbers.uniform(*map(math.log, BLOCK_ASPECT)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = numbers.randint(0, rows - height), numbers.randint(0, columns - width)
            block = mask[top : top + height, left : left + width]
            new = block.size - int(block.sum())
            if 0 < new <= remaining:
                block[...] = True
                masked += new
                is_growing = True
                break
    return mask


def _add_block(rng: np.random.Generator, mask: Mask, remaining: int) -> int:
    rows, columns = mask.shape
    largest = min(remaining, mask.size // 2)
    if largest < MIN_BLOCK_PATCHES:
        return 0
    for _ in range(ATTEMPTS):
        area = rng.uniform(MIN_BLOCK_PATCHES, largest)
        aspect = math.exp(rng.uniform(math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= remaining:
            block[...] = True
            return new
    return 0


def _edge(mask: Mask) -> Mask:
    """Return the patches that are free and touch a masked one; any mask that is not full has some."""
    near = np.zeros_like(mask)
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    edge: Mask = near & ~mask
    return edge
