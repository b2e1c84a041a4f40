"""Fit what is done to descriptors before they are stored, on a sample of the pool that does not depend on shards.

Memory: 1 KiB an image of the sample, and 4 KiB while whitening is fitted.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.dedup import SscdConfig
from curation.config.images import ImagesConfig
from curation.crashes import watch
from curation.errors import DimensionError, ImageError, StageError
from curation.images import decode
from curation.indexes.keys import Keys
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.image_sample import sample_keys, sampled_images
from curation.stages.sscd_postprocess import NUM_NEAREST, Postprocess, fit_whitening

POSTPROCESS_FILE = "postprocess.npz"


class Encoder(Protocol):
    """A copy-detection model; see ``models.sscd.SscdEncoder``."""

    batch_size: int
    dim: int

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return what the model sees of an image."""

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return unit rows (B, dim); NaN where there is none."""


class SscdFit:
    """Descriptors of the sample → mean, whitening matrix, background. Nothing is read where neither is asked for."""

    name: ClassVar[str] = "sscd_fit"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.FACES)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (POSTPROCESS_FILE,)

    def __init__(self, config: SscdConfig, limits: ImagesConfig, seed: int, load: Callable[[], Encoder]) -> None:
        """Take the settings, and what loads the model if it is needed."""
        self.config = config
        self.limits = limits
        self.seed = seed
        self.load = load

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave ``postprocess.npz`` in ``scratch``; yield nothing.

        Raises:
            StageError: The pool has too few images to fit on.
        """
        fitted = Postprocess.none()
        if "fit" in (self.config.whitening, self.config.score_norm):
            fitted = self._fit(*self._descriptors(inputs))
        fitted.save(scratch / POSTPROCESS_FILE)
        yield from ()

    def _fit(self, keys_N2: Keys, stored_ND: npt.NDArray[np.float16]) -> Postprocess:
        fitted = Postprocess.none()
        if self.config.whitening == "fit":
            try:
                mean_D, matrix_DD = fit_whitening(stored_ND)
            except DimensionError as error:
                raise StageError("sscd", None, f"whitening: {error}; set sscd.whitening: none") from error
            fitted = Postprocess(mean_D, matrix_DD, fitted.background_MD, fitted.keys_M2)
        if self.config.score_norm == "fit":
            background_ND = fitted.whitened(stored_ND.astype(np.float32))
            good = np.isfinite(background_ND).all(axis=1)
            if good.sum() <= NUM_NEAREST:
                raise StageError(
                    "sscd",
                    None,
                    f"score_norm needs more than {NUM_NEAREST} images, the pool has {good.sum()}; set it to none",
                )
            fitted = Postprocess(fitted.mean_D, fitted.matrix_DD, background_ND[good].astype(np.float16), keys_N2[good])
        return fitted

    def _descriptors(self, inputs: ReduceInputs) -> tuple[Keys, npt.NDArray[np.float16]]:
        """Return keys and descriptors of the sample, in an order of content; without images that cannot be read."""
        wanted_N2 = sample_keys(inputs, self.seed, self.config.sample_size)
        encoder = self.load()
        found_ND = np.full((len(wanted_N2), encoder.dim), np.nan, np.float16)
        batch: list[tuple[int, npt.NDArray[np.uint8]]] = []

        def flush() -> None:
            if batch:
                found_ND[[index for index, _ in batch]] = encoder([seen for _, seen in batch])
                batch.clear()

        for index, data in sampled_images(inputs, wanted_N2):
            try:
                with watch().at_work(hashlib.sha256(data).hexdigest()[:32], data, self.limits):
                    batch.append((index, encoder.prepare(decode(data, self.limits))))
            except ImageError:
                continue  # it becomes a row with a reason in the pass that stores it
            if len(batch) == encoder.batch_size:
                flush()
        flush()
        good = np.isfinite(found_ND).all(axis=1)
        return wanted_N2[good], found_ND[good]
