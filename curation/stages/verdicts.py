"""Verdicts that look at one row at a time: cheap to make again when a threshold moves."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.config.images import NsfwConfig
from curation.schema import Table
from curation.stages.nsfw import nsfw_verdict


class NsfwVerdict:
    """Reject what scores at or above ``nsfw.max_score``, and what has no score: it cannot be called safe.

    Where an image has no score because it does not decode, that is the reason.
    """

    name: ClassVar[str] = "nsfw_verdict"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.NSFW,)
    writes: Table = schema.NSFW_VERDICT

    def __init__(self, config: NsfwConfig) -> None:
        self.config = config

    def __call__(self, columns: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Table:
        """Return ``writes`` for a shard."""
        scores = columns.column("nsfw_score").combine_chunks()
        errors = pc.fill_null(columns.column("decode_error").combine_chunks(), "not_scored")
        verdict = pc.if_else(scores.is_null(), errors, nsfw_verdict(scores, self.config.max_score))
        return _only_kept(verdict, kept, self.writes)


class FacesVerdict:
    """Reject what could not be stored: it does not decode after all, or its bytes are gone.

    Bytes are gone when an earlier, stricter pixel policy rejected the image before its shard was blurred.
    """

    name: ClassVar[str] = "faces_verdict"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FACES,)
    writes: Table = schema.FACES_VERDICT

    def __call__(self, columns: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Table:
        """Return ``writes`` for a shard."""
        errors = columns.column("decode_error").combine_chunks()
        lost = columns.column("tar_offset").combine_chunks().is_null()
        verdict = pc.if_else(lost, pc.fill_null(errors, "discarded"), pa.scalar(None, pa.string()))
        return _only_kept(verdict, kept, self.writes)


def _only_kept(verdict: pa.Array, kept: npt.NDArray[np.bool_], writes: Table) -> pa.Table:
    """Leave rows to the verdict that rejected them first, so that counts add up."""
    return pa.table([pc.if_else(pa.array(kept), verdict, pa.scalar(None, pa.string()))], schema=writes.schema)
