"""A manifest as training data: ranged reads of single images, in a stateless order."""

import hashlib
import logging
import posixpath
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from curation import images
from curation.dinov2 import colour, masks
from curation.dinov2.colour import ColourPlan, Draws
from curation.dinov2.config import TrainConfig
from curation.dinov2.crops import NUM_GLOBAL, Views, multi_crop
from curation.dinov2.randomness import sample_index
from curation.dinov2.world import ALONE, World
from curation.errors import ImageError, TrainError

DIGEST_KEY = b"curation.digest"
_COLUMNS = ("tar", "tar_offset", "stored_bytes")
_ROWS_AT_A_TIME = 65_536

_log = logging.getLogger(__name__)


class ManifestImages:
    """The images of a manifest.

    Twenty bytes a row stay in memory (offset, length, number of the tar), so a hundred million rows take 2 GB; image
    ids are read again when a message needs one.

    Args:
        manifest: Path or fsspec URL of the Parquet file; tars are found relative to its folder.
        max_image_bytes: Stored images above this are refused.

    Raises:
        TrainError: If the manifest cannot be read, is empty, or names a tar that is not there.
    """

    def __init__(self, manifest: str, max_image_bytes: int) -> None:
        self.manifest = manifest
        self._max_image_bytes = max_image_bytes
        try:
            self._fs, self._path = fsspec.core.url_to_fs(manifest)
            self._load()
        except FileNotFoundError as error:
            raise TrainError(f"{manifest}: there is no such manifest; `curate run` writes one") from error
        except (OSError, ValueError, ImportError, pa.ArrowException) as error:
            raise TrainError(f"{manifest}: cannot be read as a Parquet manifest: {error}") from error
        if not len(self):
            raise TrainError(f"{manifest}: has no rows; nothing was curated, so see the funnel of its report")
        self._check_tars()

    def __len__(self) -> int:
        return len(self._offset)

    def _load(self) -> None:
        with self._fs.open(self._path, "rb") as file:
            parquet = pq.ParquetFile(file)
            missing = {"image_id", *_COLUMNS} - set(parquet.schema_arrow.names)
            if missing:
                raise TrainError(f"{self.manifest}: is not a manifest: it lacks {', '.join(sorted(missing))}")
            digest = (parquet.schema_arrow.metadata or {}).get(DIGEST_KEY)
            hasher = hashlib.sha256()
            rows = parquet.metadata.num_rows
            self._offset = np.zeros(rows, dtype=np.int64)
            self._length = np.zeros(rows, dtype=np.int64)
            self._tar = np.zeros(rows, dtype=np.int32)
            names: dict[str, int] = {}
            columns = _COLUMNS if digest else (*_COLUMNS, "image_id")
            first = 0
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=list(columns)):
                self._add(batch, first, names)
                first += batch.num_rows
                if not digest:
                    hasher.update("".join(f"{i}\n" for i in batch.column("image_id").to_pylist()).encode())
        self._tars = [self._tar_path(name) for name in names]
        self.digest = digest.decode("ascii") if digest else hasher.hexdigest()

    def _add(self, batch: pa.RecordBatch, first: int, names: dict[str, int]) -> None:
        rows = slice(first, first + batch.num_rows)
        if any(batch.column(name).null_count for name in _COLUMNS):
            raise TrainError(f"{self.manifest}: rows {first} to {rows.stop - 1} hold images without stored bytes")
        self._offset[rows] = batch.column("tar_offset").to_numpy()
        self._length[rows] = batch.column("stored_bytes").to_numpy()
        encoded = batch.column("tar").dictionary_encode()
        codes = [names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()]
        self._tar[rows] = np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]

    def _tar_path(self, name: str) -> str:
        if PurePosixPath(name).is_absolute() or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) or "\\" in name:
            raise TrainError(f"{self.manifest}: tar {name!r} must be a path relative to the manifest's folder")
        return posixpath.normpath(posixpath.join(posixpath.dirname(self._path), name))

    def _check_tars(self) -> None:
        # On object stores each check is a request, and a missing tar shows at its first read just as clearly.
        if "file" not in np.atleast_1d(self._fs.protocol):
            return
        missing = [tar for tar in self._tars if not self._fs.exists(tar)]
        if missing:
            raise TrainError(
                self._missing(missing[0], f"{len(missing)} of {len(self._tars)} tars are missing, such as ")
            )

    def _missing(self, tar: str, before: str = "") -> str:
        return f"{self.manifest}: {before}{tar} is not there; put it back beside the manifest or run `curate run` again"

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image.

        Raises:
            ImageError: If its tar ends before the image does, or its range makes no sense.
            TrainError: If its tar cannot be read.
        """
        offset, length = int(self._offset[index]), int(self._length[index])
        if offset < 0 or not 0 < length <= self._max_image_bytes:
            raise ImageError("truncated" if length <= 0 or offset < 0 else "too_large", f"{length} bytes at {offset}")
        tar = self._tars[self._tar[index]]
        try:
            data: bytes = self._fs.cat_file(tar, start=offset, end=offset + length)
        except FileNotFoundError as error:
            raise TrainError(self._missing(tar)) from error
        except OSError as error:
            raise TrainError(f"{tar}: cannot be read: {error}; training goes on with --resume") from error
        if len(data) != length:
            raise ImageError("truncated", f"{len(data)} of {length} bytes at {offset}")
        return data

    def describe(self, index: int) -> str:
        """Return the image id and place of one image, for messages."""
        place = f"{self._tars[self._tar[index]]} at byte {self._offset[index]}"
        with self._fs.open(self._path, "rb") as file:
            parquet = pq.ParquetFile(file)
            first = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if index < first + rows:
                    ids = parquet.read_row_group(group, columns=["image_id"]).column("image_id")
                    return f"{ids[index - first].as_py()} ({place})"
                first += rows
        return place


@dataclass(frozen=True)
class Sample:
    """The views of one image and the numbers that will colour them; ``replaced`` counts unreadable images before it."""

    views: Views
    draws_VN: Draws
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


class Batches:
    """Batches in a stateless order: a run can start at any step.

    Args:
        dataset: The images.
        config: Settings of the run.
        world: Processes that train together; each reads its own images only.

    Raises:
        TrainError: If there are fewer images than a batch takes, or they cannot be shared out evenly.
    """

    def __init__(self, dataset: ManifestImages, config: TrainConfig, world: World = ALONE) -> None:
        batch_size = config.data.batch_size
        if len(dataset) < batch_size:
            raise TrainError(
                f"{dataset.manifest}: holds {len(dataset)} images, fewer than a batch of {batch_size}; "
                f"give a larger manifest or set data.batch_size to at most {len(dataset)}"
            )
        self._dataset = dataset
        self._config = config
        self._parts = world.parts(batch_size, config.data.micro_batches)

    def between(self, first_step: int, end_step: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps ``first_step`` to ``end_step`` - 1; threads only read ahead."""
        workers = self._config.data.workers
        if not workers:
            for step in range(first_step, end_step):
                yield self._batches(step, [self._sample(position) for position in self._positions(step)])
            return
        pending: deque[list[Future[Sample]]] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="crops") as pool:
            try:
                for step in range(first_step, end_step):
                    last = min(end_step, step + 1 + self._config.data.prefetch_batches)
                    for ahead in range(step + len(pending), last):
                        pending.append([pool.submit(self._sample, position) for position in self._positions(ahead)])
                    yield self._batches(step, [future.result() for future in pending.popleft()])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _positions(self, step: int) -> range:
        """Return the global positions of this process's samples."""
        first = step * self._config.data.batch_size
        return range(first + self._parts[0].start, first + self._parts[-1].stop)

    def _sample(self, position: int) -> Sample:
        config = self._config
        tries = config.data.max_replacements + 1
        for attempt in range(tries):
            # The place of a replacement lies in a later batch, so that it rarely meets itself.
            index = sample_index(position + attempt * config.data.batch_size, len(self._dataset), config.seed)
            try:
                rgb_HW3 = images.decode(self._dataset.read(index), config.images, config.data.decode_min_side_px)
            except ImageError as error:
                _log.warning("image %s is unreadable and was replaced: %s", self._dataset.describe(index), error)
                continue
            views = multi_crop(rgb_HW3, config.seed, position, config.crops)
            draws = colour.draw(config.seed, position, NUM_GLOBAL + config.crops.num_local)
            return Sample(views, draws, attempt)
        raise TrainError(
            f"{self._dataset.manifest}: {tries} images in a row cannot be read; check its tars, "
            "or raise data.max_replacements"
        )

    def _batches(self, step: int, samples: list[Sample]) -> list[Batch]:
        config = self._config
        side = config.crops.global_px // config.model.patch_px
        mask_2BP = masks.batch_masks(config.seed, step, config.data.batch_size, (side, side), config.losses)
        start = self._parts[0].start
        return [
            self._batch(step, images, samples[images.start - start : images.stop - start], mask_2BP)
            for images in self._parts
        ]

    def _batch(self, step: int, images: range, samples: list[Sample], mask_2BP: masks.Mask) -> Batch:
        crops = self._config.crops
        draws = np.stack([sample.draws_VN for sample in samples], axis=1)  # view, image, number
        first, second = (
            colour.plan(draws[view], crops, crops.blur_p[view], crops.solarise_p if view else 0.0) for view in (0, 1)
        )
        both = {name: torch.cat([value, getattr(second, name)]) for name, value in vars(first).items()}
        stacks = [(_crop_major([sample.views.global_V3HW for sample in samples]), ColourPlan(**both))]
        if crops.num_local:
            numbers = draws[NUM_GLOBAL:].reshape(-1, colour.NUM_DRAWS)
            local = _crop_major([sample.views.local_V3HW for sample in samples])
            stacks.append((local, colour.plan(numbers, crops, crops.blur_p[2], 0.0)))
        mask = mask_2BP.reshape(NUM_GLOBAL, -1, mask_2BP.shape[1])[:, images.start : images.stop]
        mask_NP = torch.from_numpy(mask.reshape(-1, mask_2BP.shape[1]))
        return Batch(step, images, stacks, mask_NP, sum(sample.replaced for sample in samples))


def _crop_major(views: list[npt.NDArray[np.uint8]]) -> Tensor:
    stacked = np.stack(views, axis=1)
    return torch.from_numpy(stacked.reshape(-1, *stacked.shape[2:]))
