"""Fit the PCA that ``pca_hash`` takes signs of, on a sample of the pool that does not depend on shards.

Memory: for each image of the sample 2 bytes a feature (``side_px ** 2``, or the encoder's) and about 150 bytes of keys,
besides one shard's ids; nothing that grows with the pool.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.images import ImagesConfig, PcaHashConfig
from curation.crashes import watch
from curation.errors import ImageError
from curation.images import decode
from curation.indexes.keys import Keys
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.image_sample import sample_keys, sampled_images
from curation.stages.pca_hash import Encoder, Features, default_pca, encoder_for, fit, fit_model, quantised
from curation.stages.small_grey import small_grey

PCA_FILE = "pca.npz"


class PcaHashFit:
    """Features of the sample (the smallest hashes of seed and image id) → mean and 64 components.

    Nothing is read where the default PCA or another method is asked for; the default is what is left then.
    """

    name: ClassVar[str] = "pca_hash_fit"
    version: ClassVar[int] = 3
    reads: tuple[Table, ...] = (schema.FETCH,)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (PCA_FILE,)

    def __init__(self, config: PcaHashConfig, limits: ImagesConfig, seed: int, encoder: Encoder | None = None) -> None:
        """Take the settings, and the encoder for ``features: model``.

        Raises:
            UsageError: It is needed and was not given.
        """
        self.config = config
        self.limits = limits
        self.seed = seed
        self._encoder = encoder_for(config, encoder)

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave ``pca.npz`` in ``scratch``; yield nothing."""
        if self.config.method != "pca" or self.config.pca == "default":
            pca = default_pca(self.config.side_px)
        elif self._encoder is None:
            pca = fit(np.asarray(self._features(inputs, self._sample(inputs)), dtype=np.uint16))
        else:
            pca = fit_model(np.asarray(self._features(inputs, self._sample(inputs)), dtype=np.int16))
        pca.save(scratch / PCA_FILE)
        yield from ()

    def _sample(self, inputs: ReduceInputs) -> Keys:
        """Return the keys of the sample, in an order of content."""
        return sample_keys(inputs, self.seed, self.config.sample_size)

    def _features(self, inputs: ReduceInputs, wanted_N2: Keys) -> Features:
        """Return what the hash will see of images that can be read, one row each; of equal bytes any row will do."""
        dim = self.config.side_px**2 if self._encoder is None else self._encoder.dim
        features: Features = np.zeros((len(wanted_N2), dim), np.uint16)
        if self._encoder is not None:
            features = features.astype(np.int16)
        good = np.zeros(len(wanted_N2), bool)
        size = 1 if self._encoder is None else self._encoder.batch_size
        batch: list[tuple[int, npt.NDArray[np.uint8]]] = []
        for index, data in sampled_images(inputs, wanted_N2):
            try:
                with watch().at_work(hashlib.sha256(data).hexdigest()[:32], data, self.limits):
                    if self._encoder is None:
                        features[index] = small_grey(data, self.limits, self.config.side_px).reshape(-1)
                        good[index] = True
                    else:
                        batch.append((index, self._encoder.prepare(decode(data, self.limits))))
            except ImageError:
                continue  # it becomes a row with a reason in the pass that stores it
            if len(batch) == size:
                self._embed(batch, features, good)
        self._embed(batch, features, good)
        return features[good]

    def _embed(
        self, batch: list[tuple[int, npt.NDArray[np.uint8]]], features: Features, good: npt.NDArray[np.bool_]
    ) -> None:
        """Fill the rows of a batch, and empty it."""
        if self._encoder is None or not batch:
            return
        found_BD = self._encoder([seen for _, seen in batch])
        for (index, _), found_D in zip(batch, found_BD, strict=True):
            if np.isfinite(found_D).all():
                features[index] = quantised(found_D)
                good[index] = True
        batch.clear()
