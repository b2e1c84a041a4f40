"""Score every image for safety; a threshold makes verdicts of the scores, so it can move for free."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.config.images import NsfwConfig
from curation.stage import ImageRow

if TYPE_CHECKING:
    from curation.models.nsfw import NsfwScorer


class NsfwStage:
    """Open-NSFW's probability for each image."""

    name: ClassVar[str] = "nsfw"
    version: ClassVar[int] = 2  # raise when the output for the same input changes
    min_side_px: int | None = None  # the published preprocessing starts from all pixels
    writes: schema.Table = schema.NSFW

    def __init__(self, scorer: "NsfwScorer", config: NsfwConfig) -> None:
        """Take the loaded model.

        Args:
            scorer: Its batches are the stage's.
            config: Settings of the stage; thresholds are ``nsfw_verdict``'s business.
        """
        self.config = config
        self.batch_size = scorer.batch_size
        self._scorer = scorer

    def prepare(self, image: ImageRow) -> npt.NDArray[np.uint8]:
        """Return what the model sees of one image."""
        return self._scorer.prepare(image.rgb_HW3)

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> Mapping[str, pa.Array]:
        """Return ``nsfw_score``; null where the model's answer is not a number."""
        return {"nsfw_score": pa.array(self._scorer(batch), type=pa.float32(), from_pandas=True)}


def nsfw_verdict(scores: pa.Array, max_score: float) -> pa.Array:
    """Return ``"nsfw"`` for each score at or above ``max_score``, else null; null scores give null.

    The threshold is rounded to float32 like the scores, so that a score of 0.7 meets a threshold of 0.7.
    """
    rejected = pc.fill_null(pc.greater_equal(scores, pa.scalar(np.float32(max_score), pa.float32())), False)
    return pc.if_else(rejected, pa.scalar("nsfw"), pa.scalar(None, pa.string()))
