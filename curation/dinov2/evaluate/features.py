"""Features of a set's images: one pass of the backbone, decoded ahead by threads, written as they come.

Of each image the class tokens of the last blocks are kept, and the mean of the last block's patches. They lie in one
file, float32, that is mapped: ImageNet's 1.3 million images take 26 GB of disk for a ViT-L and no memory.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from curation.config.images import ImagesConfig
from curation.dinov2.evaluate.backbones import Backbone
from curation.dinov2.evaluate.labelled import Part
from curation.errors import DiskFullError, ImageError, InputError, VectorError
from curation.images import decode

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_PIXELS_AT_ONCE = 64 * 518**2


@dataclass(frozen=True)
class Features:
    """Features of N images.

    Attributes:
        slots_NSD: Class tokens of the last blocks, oldest first; then the mean of the patches, where there are any.
        label_N: Classes.
        has_patches: Whether the last slot is that mean.
        num_unreadable: Images that were left out because they cannot be decoded.
    """

    slots_NSD: Floats
    label_N: npt.NDArray[np.int64]
    has_patches: bool
    num_unreadable: int = 0

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def num_blocks(self) -> int:
        """Return of how many blocks there are class tokens."""
        return int(self.slots_NSD.shape[1]) - self.has_patches

    def cls(self, rows: slice) -> Tensor:
        """Return the last block's class tokens of some images, (n, D)."""
        return torch.from_numpy(np.array(self.slots_NSD[rows, self.num_blocks - 1]))

    def joined(self, rows: npt.NDArray[np.int64], blocks: int, *, pooled: bool) -> Tensor:
        """Return class tokens of the last blocks one after the other, and the patches' mean behind them."""
        end = self.num_blocks + (1 if pooled else 0)
        return torch.from_numpy(self.slots_NSD[rows, self.num_blocks - blocks : end].reshape(len(rows), -1))


@dataclass(frozen=True)
class View:
    """How images are shown to a backbone: the central square of ``crop_share`` of the short side."""

    side_px: int
    crop_share: float
    images: ImagesConfig

    def __call__(self, data: bytes) -> Pixels | None:
        """Return (side, side, 3) pixels; None where the image cannot be decoded."""
        try:
            # JPEGs are decoded at a scale at which the crop is still twice the side.
            rgb_HW3 = decode(data, self.images, round(2 * self.side_px / self.crop_share))
        except ImageError:
            return None
        height, width = rgb_HW3.shape[:2]
        kept_px = min(height, width) * self.crop_share
        left, top = (width - kept_px) / 2, (height - kept_px) / 2
        size, box = (self.side_px, self.side_px), (left, top, left + kept_px, top + kept_px)
        return np.asarray(Image.fromarray(rgb_HW3).resize(size, Image.Resampling.BICUBIC, box=box), dtype=np.uint8)


def extract(
    backbone: Backbone,
    part: Part,
    view: View,
    *,
    num_blocks: int,
    batch_size: int,
    workers: int,
    scratch: Path | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Features:
    """Return the features of a part's images; those that cannot be decoded are left out and counted.

    Args:
        backbone: On its device.
        part: The images.
        view: What the backbone sees of one.
        num_blocks: Class tokens of so many last blocks, or as many as there are.
        batch_size: Images per forward pass; fewer where they are so large that memory might not suffice.
        workers: Threads that decode.
        scratch: File for the features; None: they are held in memory.
        on_images: Told how many images more are done.

    Raises:
        InputError: No image can be decoded.
        VectorError: Features are not finite.
        DiskFullError: The scratch file does not fit.
    """
    slots: Floats | None = None
    labels: list[int] = []
    unreadable = 0
    at_once = max(1, min(batch_size, _PIXELS_AT_ONCE // view.side_px**2))
    for pixels, wanted, failed in _batches(part, view, at_once, workers):
        unreadable += failed
        if pixels:
            stacked_NSD, has_patches = _slots(backbone, np.stack(pixels), num_blocks)
            if not np.isfinite(stacked_NSD).all():
                raise VectorError(
                    f"{backbone.name}: gives features that are not finite, which no figure can be made of; its weights "
                    "are damaged, or its training went wrong: take an earlier checkpoint"
                )
            if slots is None:
                slots = _storage(scratch, (len(part), *stacked_NSD.shape[1:]))
            slots[len(labels) : len(labels) + len(pixels)] = stacked_NSD
            labels += wanted
        if on_images is not None:
            on_images(len(pixels) + failed)
    if slots is None:
        raise InputError(f"{part.files[0]}: none of {len(part)} images can be decoded" if len(part) else "no images")
    return Features(slots[: len(labels)], np.array(labels, dtype=np.int64), has_patches, unreadable)


def prepared(part: Part, view: View, workers: int) -> Iterator[tuple[Pixels | None, int]]:
    """Yield what the backbone will see of each image (None: it cannot be decoded), and its class."""
    with ThreadPoolExecutor(workers, thread_name_prefix="evaluate") as pool:
        pending: deque[tuple[Future[Pixels | None], int]] = deque()
        images = part.read()
        try:
            for data, label in islice(images, 8 * workers):
                pending.append((pool.submit(view, data), label))
            while pending:
                future, label = pending.popleft()
                for data, next_label in islice(images, 1):
                    pending.append((pool.submit(view, data), next_label))
                yield future.result(), label
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(part: Part, view: View, size: int, workers: int) -> Iterator[tuple[list[Pixels], list[int], int]]:
    """Yield pixels and classes of up to ``size`` images, and how many of them cannot be decoded."""
    images = prepared(part, view, workers)
    while batch := list(islice(images, size)):
        readable = [(pixels, label) for pixels, label in batch if pixels is not None]
        yield [pixels for pixels, _ in readable], [label for _, label in readable], len(batch) - len(readable)


@torch.no_grad()
def _slots(backbone: Backbone, pixels_NHW3: Pixels, num_blocks: int) -> tuple[Floats, bool]:
    tokens = backbone(torch.from_numpy(pixels_NHW3), num_blocks)
    slots = [block.cls_ND for block in tokens]
    patches = tokens[-1].patches_NPD
    if patches is not None:
        slots.append(patches.mean(dim=1))
    return torch.stack(slots, dim=1).float().cpu().numpy(), patches is not None


def _storage(scratch: Path | None, shape: tuple[int, ...]) -> Floats:
    if scratch is None:
        return np.empty(shape, dtype=np.float32)
    num_bytes = int(np.prod(shape)) * np.dtype(np.float32).itemsize
    try:
        with scratch.open("wb") as file:
            # Taken now: a mapped file that finds no space later ends the process with a bus error.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise DiskFullError(f"{scratch}: no space for {num_bytes / 1e9:.1f} GB of features: {error}") from error
    return np.memmap(scratch, dtype=np.float32, mode="r+", shape=shape)
