"""Stochastic depth on a subset of the batch: which rows run each residual branch.

Source:
    Oquab et al. 2023, "DINOv2: learning robust visual features without supervision", section 5 (efficient stochastic
    depth).
"""

from collections.abc import Iterator

import numpy as np
import torch

from curation.dinov2.config import TrainConfig
from curation.dinov2.crops import NUM_GLOBAL
from curation.dinov2.model import Kept, KeptRows
from curation.dinov2.randomness import Purpose, scores

BRANCHES = 2  # attention and feed-forward


def kept_rows(config: TrainConfig, step: int, images: range) -> KeptRows | None:
    """Return the rows of a part of the batch that run each residual branch, on the CPU; None without drop path.

    Of the n rows of the whole step max(1, ⌊n (1 − p)⌋) run: those whose numbers, drawn from the sample's global
    position, are smallest. How the batch is cut into parts changes nothing, so a part may have none of them.

    Args:
        config: Settings of the run.
        step: Zero-based.
        images: Places of the part in the batch of the whole step.
    """
    share = config.model.drop_path
    if not share:
        return None
    size = config.data.batch_size
    positions = step * size + np.arange(size, dtype=np.int64)
    stacks = [range(NUM_GLOBAL), range(NUM_GLOBAL, NUM_GLOBAL + config.crops.num_local)]

    def chosen(block: int, branch: int, crops: range) -> Kept:
        parts = [(block * BRANCHES + branch) * 64 + crop for crop in crops]
        numbers = np.concatenate([scores(config.seed, Purpose.DROP_PATH, part, positions) for part in parts])
        count = max(1, int(len(numbers) * (1 - share)))
        rows = np.sort(np.argpartition(numbers, count - 1)[:count])
        crop, image = np.divmod(rows, size)
        mine = (image >= images.start) & (image < images.stop)
        local = crop[mine] * len(images) + image[mine] - images.start
        return Kept(torch.from_numpy(local), len(numbers) / count)

    return [
        [(chosen(block, 0, crops), chosen(block, 1, crops)) for crops in stacks if crops]
        for block in range(config.model.shape.depth)
    ]


def moved(kept: KeptRows | None, device: torch.device) -> KeptRows | None:
    """Return the rows on a device, by one copy."""
    if kept is None:
        return None
    every = [one for block in kept for pair in block for one in pair]
    rows = torch.cat([one.rows for one in every])
    if device.type == "cuda":  # what is not pinned is copied only once the device has come to it
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    there: Iterator[Kept] = (
        Kept(part, one.scale)
        for part, one in zip(torch.split(rows, [len(one.rows) for one in every]), every, strict=True)
    )
    return [[(next(there), next(there)) for _ in block] for block in kept]
