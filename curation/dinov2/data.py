"""Batches of a run: read, decoded and cropped ahead, in an order that follows from seed and step alone."""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from curation.dinov2 import colour
from curation.dinov2.colour import ColourPlan
from curation.dinov2.config import DataConfig, TrainConfig
from curation.dinov2.crop_workers import CropWorkers, Makers, OwnMaker, start_ahead
from curation.dinov2.cropping import Source, Task
from curation.dinov2.crops import NUM_GLOBAL
from curation.dinov2.drop_path import kept_rows
from curation.dinov2.manifests import ManifestImages
from curation.dinov2.model import KeptRows
from curation.dinov2.order import Order
from curation.dinov2.reading import ChunkReader, RangedReader, Reader
from curation.dinov2.world import ALONE, World
from curation.errors import CurationError, ImageError, TrainError

_READERS_AHEAD = 2
_IMAGES_AT_ONCE = 16
_MAX_WORKERS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What a process needs for one step or a part of it, on the CPU.

    Attributes:
        step: Zero-based.
        images: Places in the batch of the whole step.
        crops: uint8 stacks, crop-major, each with what happens to its colours: the two global crops, then the local
            ones (no stack where there are none).
        mask_NP: Masked patches of the 2B global crops, bool; crop-major like all stacks.
        kept: Rows that run each residual branch; None: all.
        num_replaced: Images that could not be read and were replaced.
    """

    step: int
    images: range
    crops: list[tuple[Tensor, ColourPlan]]
    mask_NP: Tensor
    kept: KeptRows | None
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
        device: What batches are for; None: a CPU.

    Raises:
        TrainError: If there are fewer images than a batch takes, or they cannot be shared out evenly.
    """

    def __init__(
        self,
        manifests: Sequence[ManifestImages],
        config: TrainConfig,
        world: World = ALONE,
        device: torch.device | None = None,
    ) -> None:
        data = config.data
        self._device, self._num_workers = device, _workers(data, device)
        if self._num_workers:
            with suppress(OSError):  # said again when they are needed
                start_ahead()
        self._manifests = manifests
        num_images = sum(map(len, manifests))
        self._names = ", ".join(manifest.manifest for manifest in manifests)
        if num_images < data.batch_size:
            raise TrainError(
                f"{self._names}: holds {num_images} images, fewer than a batch of {data.batch_size}; "
                f"give a larger manifest or set data.batch_size to at most {num_images}"
            )
        self._config = config
        self._parts = world.parts(data.batch_size, data.micro_batches)
        self._images = range(self._parts[0].start, self._parts[-1].stop)
        self._order = Order([len(m) for m in manifests], shares(manifests, config), data, config.seed)
        self._reader: Reader = RangedReader(manifests)
        if data.reading == "streaming":
            width = data.batch_size // data.lanes
            num_lanes = 1 + (self._images.stop - 1) // width - self._images.start // width
            windows = 2 * num_lanes * len(manifests)  # this one and the next of each lane
            self._reader = ChunkReader(manifests, self._order, windows * data.window_chunks + 1)

    def between(self, first_step: int, end_step: int) -> Generator[list[Batch], None, None]:
        """Yield the micro-batches of steps ``first_step`` to ``end_step`` - 1; workers only make them ahead."""
        files = [manifest.files for manifest in self._manifests]
        if not self._num_workers:
            own = OwnMaker(self._config, files, len(self._parts[0]))
            for step in range(first_step, end_step):
                yield [self._batch(own, step, 0, part, self._make(own, step, 0, part, part)) for part in self._parts]
            return
        at_once = self._config.data.prefetch_batches + 1
        makers = CropWorkers(
            self._num_workers, self._config, files, len(self._parts[0]), at_once * len(self._parts), self._device
        )
        with closing(makers):
            yield from self._ahead(makers, range(first_step, end_step), at_once)

    def _ahead(self, makers: Makers, steps: range, at_once: int) -> Generator[list[Batch], None, None]:
        ahead: deque[Future[list[Batch]]] = deque()
        workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="crops")
        assembler = ThreadPoolExecutor(1, thread_name_prefix="batches")
        readers = ThreadPoolExecutor(_READERS_AHEAD, thread_name_prefix="chunks")
        pools = (assembler, workers, readers)
        try:
            for step in steps:
                for later in steps[step - steps.start + len(ahead) :][: at_once - len(ahead)]:
                    if self._config.data.reading == "streaming":
                        readers.submit(self._read_ahead, later)
                    parts = []
                    for index, part in enumerate(self._parts):
                        # Free since what was in it has been taken, as many steps before.
                        slot = later % at_once * len(self._parts) + index
                        made = [workers.submit(self._make, makers, later, slot, part, few) for few in self._cut(part)]
                        parts.append(_Part(part, slot, made))
                    ahead.append(assembler.submit(self._assembled, makers, later, parts))
                yield ahead.popleft().result()
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)

    def _cut(self, part: range) -> Iterator[range]:
        """Cut images into what a worker makes at a time: worth a message, and nobody waits for long."""
        few = max(1, min(_IMAGES_AT_ONCE, -(-len(self._images) // (2 * self._num_workers))))
        for first in range(0, len(part), few):
            yield part[first : first + few]

    def _assembled(self, makers: Makers, step: int, parts: list["_Part"]) -> list[Batch]:
        return [
            self._batch(makers, step, slot, images, sum(few.result() for few in made)) for images, slot, made in parts
        ]

    def _read_ahead(self, step: int) -> None:
        """Read the chunks that the lanes of a step's images need a window later."""
        batch_size = self._config.data.batch_size
        later = self._order.readahead() // batch_size * batch_size
        for image in self._images:
            with suppress(CurationError):  # said again, and acted on, when the image itself is needed
                self._reader.source(self._order.at(step * batch_size + image + later))

    def _make(self, makers: Makers, step: int, slot: int, part: range, images: range) -> int:
        """Make the samples of some images of a part; return how many that cannot be read were replaced."""
        batch_size, tries = self._config.data.batch_size, self._config.data.max_replacements + 1
        waiting: Sequence[int] = images
        num_replaced = 0
        for attempt in range(tries):
            # The place of a replacement lies in a later batch, so that it rarely meets itself.
            places = {image: self._order.at((step + attempt) * batch_size + image) for image in waiting}
            failures: dict[int, ImageError] = {}
            sources = []
            for image, place in places.items():
                try:
                    sources.append(Source(image, self._reader.source(place)))
                except ImageError as error:
                    failures[image] = error
            drawn = range(0) if attempt else images
            failures |= makers.make(Task(step, slot, part.start, sources, drawn))
            for image in sorted(failures):
                described = self._reader.describe(places[image])
                _log.warning("image %s is unreadable and was replaced: %s", described, failures[image])
            if not failures:
                return num_replaced
            num_replaced += len(failures)
            waiting = sorted(failures)
        raise TrainError(
            f"{self._names}: {tries} images in a row cannot be read; check the tars, or raise data.max_replacements"
        )

    def _batch(self, makers: Makers, step: int, slot: int, part: range, num_replaced: int) -> Batch:
        made = makers.taken(slot)
        draws_VND = made.draws_VND.numpy()
        stacks = [(made.global_VN3HW.flatten(0, 1), self._plan(draws_VND, 0, NUM_GLOBAL))]
        if self._config.crops.num_local:
            stacks.append((made.local_VN3HW.flatten(0, 1), self._plan(draws_VND, NUM_GLOBAL, len(draws_VND))))
        return Batch(step, part, stacks, made.mask_VNP.flatten(0, 1), kept_rows(self._config, step, part), num_replaced)

    def _plan(self, draws_VND: colour.Draws, first: int, end: int) -> ColourPlan:
        config = self._config.crops
        return ColourPlan.joined(
            [
                colour.plan(draws_VND[view], config, config.blur_p[min(view, 2)], config.solarise_p * (view == 1))
                for view in range(first, end)
            ]
        )


class _Part(NamedTuple):
    """A micro-batch in the making: places in the batch, where its samples go, and who says how many were replaced."""

    images: range
    slot: int
    made: list[Future[int]]


def _workers(config: DataConfig, device: torch.device | None) -> int:
    """Return how many processes make samples: those asked for, else for a GPU its share of the cores."""
    if config.workers is not None:
        return config.workers
    if device is None or device.type == "cpu":
        return 0  # the cores are busy with training
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
