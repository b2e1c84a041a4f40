"""Embed every image with the encoder that retrieval and clustering use."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.selection import EmbedConfig
from curation.stage import ImageRow
from curation.stages.descriptors import half_rows


class Encoder(Protocol):
    """What the stage needs of ``models.encoder.ImageEncoder``, whose import takes torch and timm."""

    batch_size: int
    dim: int
    short_px: int

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return what the model sees of one image."""

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return L2-normalised features, shape (B, dim); NaN rows where there are none."""


class EmbedStage:
    """Encoder features, L2-normalised, float16."""

    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 3  # raise when the output for the same input changes

    def __init__(self, encoder: Encoder, config: EmbedConfig) -> None:
        """Take the loaded model; its batches and its dimension are the stage's."""
        self.config = config
        self.writes = schema.embed(encoder.dim)
        self.batch_size = encoder.batch_size
        self.min_side_px = encoder.short_px
        self._encoder = encoder

    def prepare(self, image: ImageRow) -> npt.NDArray[np.uint8]:
        """Return what the model sees of one image."""
        return self._encoder.prepare(image.rgb_HW3)

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> Mapping[str, pa.Array]:
        """Return ``embedding``; null where the model gave no direction."""
        return {"embedding": half_rows(self._encoder(batch))}
