"""Samples are made here: read, decoded and cropped into memory that is there already, by whichever process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from curation import images
from curation.dinov2 import colour, crops, masks
from curation.dinov2.config import TrainConfig
from curation.dinov2.crops import NUM_GLOBAL, Views
from curation.dinov2.manifests import Stored, TarFiles
from curation.errors import ImageError, TrainError

_ALIGNED_BYTES = 64


@dataclass(frozen=True)
class PartArrays:
    """What is made of the N images of a part of a step, over one piece of memory.

    Attributes:
        global_VN3HW: The two global crops, uint8.
        local_VN3HW: The local crops, uint8.
        draws_VND: Numbers that colour the crops, float64.
        mask_VNP: Masked patches of the global crops, bool.
    """

    global_VN3HW: Tensor
    local_VN3HW: Tensor
    draws_VND: Tensor
    mask_VNP: Tensor

    @classmethod
    def over(cls, memory: Tensor, config: TrainConfig, num_images: int) -> "PartArrays":
        """Return the arrays that lie in some memory, ``num_bytes`` of uint8 or more."""
        arrays, start = [], 0
        for shape, kind in _layout(config, num_images):
            length = math.prod(shape) * kind.itemsize
            arrays.append(memory[start : start + length].view(kind).view(shape))
            start += _aligned(length)
        return cls(*arrays)

    @staticmethod
    def num_bytes(config: TrainConfig, num_images: int) -> int:
        """Return the memory that the arrays take."""
        return sum(_aligned(math.prod(shape) * kind.itemsize) for shape, kind in _layout(config, num_images))

    def views(self, number: int) -> Views:
        """Return the crops of one image, to be written to."""
        return Views(self.global_VN3HW[:, number].numpy(), self.local_VN3HW[:, number].numpy())


def _layout(config: TrainConfig, num_images: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    sizes, num_local = config.crops, config.crops.num_local
    return [
        ((NUM_GLOBAL, num_images, 3, sizes.global_px, sizes.global_px), torch.uint8),
        ((num_local, num_images, 3, sizes.local_px, sizes.local_px), torch.uint8),
        ((NUM_GLOBAL + num_local, num_images, colour.NUM_DRAWS), torch.float64),
        ((NUM_GLOBAL, num_images, (sizes.global_px // config.model.patch_px) ** 2), torch.bool),
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


class Source(NamedTuple):
    """An image to be made a sample: its place in the batch, and its bytes or where they lie in a manifest's tars."""

    image: int
    data: bytes | tuple[int, Stored]


@dataclass(frozen=True)
class Task:
    """Some samples of a part of a step.

    Attributes:
        step: Zero-based.
        slot: Number of the memory that they go to.
        first_image: Place in the batch of the image that comes first in the part.
        sources: The images.
        drawn: Places in the batch whose numbers and masks are wanted too; they need no image.
    """

    step: int
    slot: int
    first_image: int
    sources: list[Source]
    drawn: range = field(default=range(0))


class Cropper:
    """Makes samples.

    Args:
        config: Settings of the run.
        files: The tars of each manifest; None where only bytes are given.
    """

    def __init__(self, config: TrainConfig, files: Sequence[TarFiles | None]) -> None:
        self._config = config
        self._files = files

    def make(self, task: Task, out: PartArrays) -> dict[int, ImageError]:
        """Make samples; return what is wrong with those that cannot be made, by their places in the batch.

        Raises:
            TrainError: A tar cannot be read.
        """
        if task.drawn:
            self._draw(task, out)
        failures = {}
        for source in task.sources:
            position = task.step * self._config.data.batch_size + source.image
            try:
                self._crop(source, position, out.views(source.image - task.first_image))
            except ImageError as error:
                failures[source.image] = error
        return failures

    def _draw(self, task: Task, out: PartArrays) -> None:
        config, batch_size = self._config, self._config.data.batch_size
        side = config.crops.global_px // config.model.patch_px
        mask_NP = masks.batch_masks(config.seed, task.step, batch_size, (side, side), config.losses, task.drawn)
        places = slice(task.drawn.start - task.first_image, task.drawn.stop - task.first_image)
        out.mask_VNP.numpy()[:, places] = mask_NP.reshape(NUM_GLOBAL, len(task.drawn), -1)
        draws_VND = out.draws_VND.numpy()
        for image in task.drawn:
            position = task.step * batch_size + image
            draws_VND[:, image - task.first_image] = colour.draw(config.seed, position, len(draws_VND))

    def _crop(self, source: Source, position: int, views: Views) -> None:
        config = self._config
        draws = crops.draw(config.seed, position, config.crops)

        def side_px(width: int, height: int) -> int | None:
            return crops.reduced_side((width, height), draws, config.crops)

        data = source.data if isinstance(source.data, bytes) else self._read(*source.data)
        rgb_HW3 = images.decode(data, config.images, side_px if config.data.reduced_decode else None)
        crops.multi_crop(rgb_HW3, draws, config.crops, views)

    def _read(self, manifest: int, stored: Stored) -> bytes:
        files = self._files[manifest]
        if files is None:
            raise TrainError(f"{stored.tar}: its manifest's tars are not read here")
        return files.read(stored)
