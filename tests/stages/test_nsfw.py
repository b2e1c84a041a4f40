import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.config.images import NsfwConfig
from curation.models.nsfw import NsfwScorer
from curation.models.weights import resolve
from curation.stage import ImageRow
from curation.stages.nsfw import NsfwStage, nsfw_verdict


def scores(*values):
    return pa.array(values, pa.float32())


def test_a_score_at_the_threshold_is_rejected():
    assert nsfw_verdict(scores(0.25, 0.5, 0.75), 0.5).to_pylist() == [None, "nsfw", "nsfw"]


def test_a_threshold_that_float32_rounds_is_met_by_its_own_score():
    assert nsfw_verdict(scores(0.7, 0.6999), 0.7).to_pylist() == ["nsfw", None]


def test_an_image_without_a_score_is_not_rejected():
    verdict = nsfw_verdict(scores(None, 1.0), 0.5)

    assert verdict.to_pylist() == [None, "nsfw"]
    assert verdict.type == schema.NSFW_VERDICT.schema.field("reject_reason").type
    assert nsfw_verdict(scores(), 0.5).to_pylist() == []


def test_the_stage_writes_one_score_an_image():
    data = pytest.importorskip("skimage.data")
    stage = NsfwStage(NsfwScorer(resolve("opennsfw"), batch_size=2), NsfwConfig(batch_size=2))
    batch = [stage.prepare(ImageRow(row, "id", b"", rgb)) for row, rgb in enumerate((data.coffee(), data.chelsea()))]

    column = stage(batch)["nsfw_score"]

    assert column.type == schema.NSFW_SCORE.type
    assert all(0 <= score < 0.5 for score in column.to_pylist())
    assert stage(batch[1:])["nsfw_score"].to_pylist() == column.to_pylist()[1:]


class _BrokenScorer(NsfwScorer):
    def __call__(self, batch):
        return np.full(len(batch), np.nan, np.float32)


def test_an_answer_that_is_not_a_number_is_null():
    stage = NsfwStage(_BrokenScorer(resolve("opennsfw")), NsfwConfig())

    assert stage([np.zeros((224, 224, 3), np.uint8)])["nsfw_score"].to_pylist() == [None]
