import numpy as np
import pytest

from curation import schema
from curation.config.selection import EmbedConfig
from curation.stage import ImageRow
from curation.stages.embed import EmbedStage

data = pytest.importorskip("skimage.data")


class MeanColour:
    """An encoder in four lines: the mean colour as a direction."""

    batch_size = 2
    dim = 3
    short_px = 8

    def prepare(self, rgb_HW3):
        return rgb_HW3

    def __call__(self, batch):
        means = np.stack([rgb.reshape(-1, 3).mean(axis=0) for rgb in batch])
        with np.errstate(invalid="ignore"):
            return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def test_the_table_has_the_encoders_dimension_and_black_is_null():
    stage = EmbedStage(MeanColour(), EmbedConfig())
    pictures = [data.coffee(), np.zeros((20, 20, 3), np.uint8)]

    column = stage([stage.prepare(ImageRow(row, "id", b"", rgb)) for row, rgb in enumerate(pictures)])["embedding"]

    assert stage.writes == schema.embed(3)
    assert stage.batch_size == 2
    assert column.type == schema.embed(3).schema.field("embedding").type
    first, black = column.to_pylist()
    assert np.linalg.norm(np.array(first, np.float64)) == pytest.approx(1, abs=2e-3)
    assert black is None
