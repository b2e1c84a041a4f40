"""Batches of a run: read, decoded and cropped ahead by threads, in an order that follows from seed and step alone."""

import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curation import images
from curation.dinov2 import colour, crops, masks
from curation.dinov2.colour import ColourPlan
from curation.dinov2.config import TrainConfig
from curation.dinov2.crops import NUM_GLOBAL, Views
from curation.dinov2.manifests import ManifestImages
from curation.dinov2.order import Order
from curation.dinov2.reading import ChunkReader, RangedReader, Reader
from curation.dinov2.world import ALONE, World
from curation.errors import CurationError, ImageError, TrainError

_READERS_AHEAD = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """The views of one image and the numbers that will colour them; ``replaced`` counts unreadable images before it."""

    views: Views
    draws_VN: colour.Draws
    replaced: int


@dataclass(frozen=True)
class Batch:
    """What a process needs for one step or a part of it, on the CPU.

    Attributes:
        step: Zero-based.
        images: Places in the batch of the whole step.
        crops: uint8 stacks, crop-major, each with what happens to its colours: the two global crops, then the local
            ones (no stack where there are none).
        mask_NP: Masked patches of the 2B global crops, bool; crop-major like all stacks.
        num_replaced: Images that could not be read and were replaced.
    """

    step: int
    images: range
    crops: list[tuple[Tensor, ColourPlan]]
    mask_NP: Tensor
    num_replaced: int


def open_manifests(manifest: str | None, config: TrainConfig) -> list[ManifestImages]:
    """Return the images of one manifest, or of those in the settings.

    Raises:
        TrainError: If there is no manifest, or both ways name some, or one cannot be used.
    """
    named = config.data.manifests
    if bool(named) == (manifest is not None):
        raise TrainError("give one manifest, or several as data.manifests in the settings, and not both")
    paths = [manifest] if manifest is not None else [entry.path for entry in named]
    return [ManifestImages(path, config.data.max_image_bytes) for path in paths]


def shares(manifests: Sequence[ManifestImages], config: TrainConfig) -> list[float]:
    """Return the weight of each manifest: its own, or its number of images."""
    weights = [entry.weight for entry in config.data.manifests] or [None]
    return [float(len(m)) if weight is None else weight for m, weight in zip(manifests, weights, strict=True)]


class Batches:
    """Batches in a stateless order: a run can start at any step.

    Args:
        manifests: The images: those of ``config.data.manifests`` in that order, else one manifest.
        config: Settings of the run.
        world: Processes that train together; each reads its own images only.

    Raises:
        TrainError: If there are fewer images than a batch takes, or they cannot be shared out evenly.
    """

    def __init__(self, manifests: Sequence[ManifestImages], config: TrainConfig, world: World = ALONE) -> None:
        data = config.data
        num_images = sum(map(len, manifests))
        self._names = ", ".join(manifest.manifest for manifest in manifests)
        if num_images < data.batch_size:
            raise TrainError(
                f"{self._names}: holds {num_images} images, fewer than a batch of {data.batch_size}; "
                f"give a larger manifest or set data.batch_size to at most {num_images}"
            )
        self._config = config
        self._parts = world.parts(data.batch_size, data.micro_batches)
        self._order = Order([len(m) for m in manifests], shares(manifests, config), data, config.seed)
        self._reader: Reader = RangedReader(manifests)
        if data.reading == "streaming":
            width = data.batch_size // data.lanes
            num_lanes = 1 + (self._parts[-1].stop - 1) // width - self._parts[0].start // width
            windows = 2 * num_lanes * len(manifests)  # this one and the next of each lane
            self._reader = ChunkReader(manifests, self._order, windows * data.window_chunks + 1)

    def between(self, first_step: int, end_step: int) -> Generator[list[Batch], None, None]:
        """Yield the micro-batches of steps ``first_step`` to ``end_step`` - 1; threads only read ahead."""
        data = self._config.data
        if not data.workers:
            for step in range(first_step, end_step):
                yield self._batches(step, [self._sample(position) for position in self._positions(step)])
            return
        ahead: deque[Future[list[Batch]]] = deque()
        workers = ThreadPoolExecutor(data.workers, thread_name_prefix="crops")
        assembler = ThreadPoolExecutor(1, thread_name_prefix="batches")
        readers = ThreadPoolExecutor(_READERS_AHEAD, thread_name_prefix="chunks")
        pools = (assembler, workers, readers)
        try:
            for step in range(first_step, end_step):
                for later in range(step + len(ahead), min(end_step, step + 1 + data.prefetch_batches)):
                    positions = self._positions(later)
                    if data.reading == "streaming":
                        readers.submit(self._read_ahead, positions)
                    samples = [workers.submit(self._sample, position) for position in positions]
                    ahead.append(assembler.submit(self._assembled, later, samples))
                yield ahead.popleft().result()
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)

    def _assembled(self, step: int, samples: list[Future[Sample]]) -> list[Batch]:
        return self._batches(step, [sample.result() for sample in samples])

    def _positions(self, step: int) -> range:
        """Return the global positions of this process's samples."""
        first = step * self._config.data.batch_size
        return range(first + self._parts[0].start, first + self._parts[-1].stop)

    def _read_ahead(self, positions: range) -> None:
        """Read the chunks that these positions' lanes need a window later."""
        later = self._order.readahead() // self._config.data.batch_size * self._config.data.batch_size
        for position in positions:
            with suppress(CurationError):  # said again, and acted on, when the image itself is needed
                self._reader.read(self._order.at(position + later))

    def _sample(self, position: int) -> Sample:
        config = self._config
        tries = config.data.max_replacements + 1
        draws = crops.draw(config.seed, position, config.crops)
        for attempt in range(tries):
            # The place of a replacement lies in a later batch, so that it rarely meets itself.
            place = self._order.at(position + attempt * config.data.batch_size)
            try:
                rgb_HW3 = self._decoded(self._reader.read(place), draws)
            except ImageError as error:
                _log.warning("image %s is unreadable and was replaced: %s", self._reader.describe(place), error)
                continue
            views = crops.multi_crop(rgb_HW3, draws, config.crops)
            return Sample(views, colour.draw(config.seed, position, len(draws)), attempt)
        raise TrainError(
            f"{self._names}: {tries} images in a row cannot be read; check the tars, or raise data.max_replacements"
        )

    def _decoded(self, data: bytes, draws: crops.Draws) -> npt.NDArray[np.uint8]:
        config = self._config

        def side_px(width: int, height: int) -> int | None:
            return crops.reduced_side((width, height), draws, config.crops)

        return images.decode(data, config.images, side_px if config.data.reduced_decode else None)

    def _batches(self, step: int, samples: list[Sample]) -> list[Batch]:
        start = self._parts[0].start
        return [self._batch(step, part, samples[part.start - start : part.stop - start]) for part in self._parts]

    def _batch(self, step: int, part: range, samples: list[Sample]) -> Batch:
        config = self._config
        draws = np.stack([sample.draws_VN for sample in samples], axis=1)  # view, image, number
        stacks = [(_crop_major([sample.views.global_V3HW for sample in samples]), self._plan(draws, 0, NUM_GLOBAL))]
        if config.crops.num_local:
            local = _crop_major([sample.views.local_V3HW for sample in samples])
            stacks.append((local, self._plan(draws, NUM_GLOBAL, len(draws))))
        side = config.crops.global_px // config.model.patch_px
        mask_NP = masks.batch_masks(config.seed, step, config.data.batch_size, (side, side), config.losses, part)
        return Batch(step, part, stacks, torch.from_numpy(mask_NP), sum(sample.replaced for sample in samples))

    def _plan(self, draws_VIN: colour.Draws, first: int, end: int) -> ColourPlan:
        config = self._config.crops
        return ColourPlan.joined(
            [
                colour.plan(draws_VIN[view], config, config.blur_p[min(view, 2)], config.solarise_p * (view == 1))
                for view in range(first, end)
            ]
        )


def _crop_major(views: list[npt.NDArray[np.uint8]]) -> Tensor:
    stacked = np.stack(views, axis=1)
    return torch.from_numpy(stacked.reshape(-1, *stacked.shape[2:]))
