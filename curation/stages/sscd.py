"""Describe every image for copy detection."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config import SscdConfig
from curation.models.sscd import SscdEncoder
from curation.stage import ImageRow
from curation.stages.descriptors import half_rows


class SscdStage:
    """SSCD descriptors, L2-normalised, float16."""

    name: ClassVar[str] = "sscd"
    version: ClassVar[int] = 3  # raise when the output for the same input changes
    writes: schema.Table = schema.SSCD
    min_side_px: int | None

    def __init__(self, encoder: SscdEncoder, config: SscdConfig) -> None:
        """Take the loaded model; its batches are the stage's."""
        self.config = config
        self.batch_size = encoder.batch_size
        self.min_side_px = config.side_px
        self._encoder = encoder

    def prepare(self, image: ImageRow) -> npt.NDArray[np.uint8]:
        """Return what the model sees of one image."""
        return self._encoder.prepare(image.rgb_HW3)

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> Mapping[str, pa.Array]:
        """Return ``sscd``; null where the model gave no direction."""
        return {"sscd": half_rows(self._encoder(batch))}
