"""Describe every image for copy detection."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.indexes.keys import keys_from_hex
from curation.models.sscd import SscdEncoder
from curation.stage import ImageRow
from curation.stages.descriptors import half_rows
from curation.stages.sscd_postprocess import Postprocess

Seen = tuple[str, npt.NDArray[np.uint8]]


class SscdStage:
    """SSCD descriptors, whitened if that was fitted, L2-normalised, float16; and the bias of their scores."""

    name: ClassVar[str] = "sscd"
    version: ClassVar[int] = 3  # raise when the output for the same input changes
    writes: schema.Table = schema.SSCD
    min_side_px: int | None

    def __init__(self, encoder: SscdEncoder, postprocess: Postprocess) -> None:
        """Take the loaded model, whose batches are the stage's, and what was fitted."""
        self.batch_size = encoder.batch_size
        self.min_side_px = encoder.side_px
        self._encoder = encoder
        self._postprocess = postprocess

    @property
    def fitted(self) -> str:
        """A digest of what was fitted."""
        return self._postprocess.digest

    def prepare(self, image: ImageRow) -> Seen:
        """Return the id of an image and what the model sees of it."""
        return image.image_id, self._encoder.prepare(image.rgb_HW3)

    def __call__(self, batch: Sequence[Seen]) -> Mapping[str, pa.Array]:
        """Return ``sscd`` and ``score_bias``; null where the model gave no direction, or no background was fitted."""
        unit_BD = self._postprocess.whitened(self._encoder([seen for _, seen in batch]))
        bias_B = self._postprocess.bias(unit_BD, keys_from_hex([image_id for image_id, _ in batch]))
        return {"sscd": half_rows(unit_BD), "score_bias": pa.array(bias_B, from_pandas=True)}
