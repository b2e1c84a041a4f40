"""Describe every image for copy detection.

Pool and seed images come blurred. References are read where they lie, so their faces are hidden here, in memory, the
way ``faces`` hides them: a copy in the pool has lost the same parts.
"""

from collections.abc import Callable, Mapping, Sequence
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
    version: ClassVar[int] = 4  # raise when the output for the same input changes
    writes: schema.Table = schema.SSCD
    min_side_px: int | None

    def __init__(
        self,
        encoder: SscdEncoder,
        postprocess: Postprocess,
        hide_faces: Callable[[ImageRow], npt.NDArray[np.uint8]] | None = None,
    ) -> None:
        """Take the loaded model, whose batches are the stage's, what was fitted, and what blurs references."""
        self.batch_size = encoder.batch_size
        self.min_side_px = encoder.side_px
        self._encoder = encoder
        self._postprocess = postprocess
        self._hide_faces = hide_faces

    @property
    def fitted(self) -> str:
        """A digest of what was fitted."""
        return self._postprocess.digest

    def prepare(self, image: ImageRow) -> Seen:
        """Return the id of an image and what the model sees of it."""
        rgb_HW3 = image.rgb_HW3
        if self._hide_faces is not None and image.collection.startswith("references/"):
            rgb_HW3 = self._hide_faces(image)
        return image.image_id, self._encoder.prepare(rgb_HW3)

    def __call__(self, batch: Sequence[Seen]) -> Mapping[str, pa.Array]:
        """Return ``sscd`` and ``score_bias``; null where the model gave no direction, or no background was fitted."""
        unit_BD = self._postprocess.whitened(self._encoder([seen for _, seen in batch]))
        bias_B = self._postprocess.bias(unit_BD, keys_from_hex([image_id for image_id, _ in batch]))
        return {"sscd": half_rows(unit_BD), "score_bias": pa.array(bias_B, from_pandas=True)}
