import numpy as np
import pytest

from curation import schema
from curation.errors import WeightsError
from curation.models.sscd import SscdEncoder
from curation.models.weights import resolve
from curation.stage import ImageRow
from curation.stages.descriptors import half_rows
from curation.stages.sscd import SscdStage
from curation.stages.sscd_postprocess import Postprocess

ID = "0" * 31 + "1"


def test_the_stage_writes_unit_float16_rows():
    data = pytest.importorskip("skimage.data")
    try:
        weights = resolve("immaculate-sscd")
    except WeightsError as error:
        pytest.skip(str(error))
    stage = SscdStage(SscdEncoder(weights, batch_size=2), Postprocess.none())

    columns = stage([stage.prepare(ImageRow(0, ID, b"", data.coffee()))])

    assert columns["sscd"].type == schema.SSCD_DESCRIPTOR.type
    assert np.linalg.norm(np.array(columns["sscd"].to_pylist()[0], np.float64)) == pytest.approx(1, abs=2e-3)
    assert columns["score_bias"].to_pylist() == [None]


def test_rows_that_are_not_finite_become_null_and_keep_their_neighbours():
    rows = half_rows(np.array([[0.5, 1], [np.nan, 0], [np.inf, 0], [0.25, 0]], np.float32))

    assert rows.to_pylist() == [[0.5, 1.0], None, None, [0.25, 0.0]]


def test_no_rows_are_an_empty_column():
    assert half_rows(np.empty((0, 3), np.float32)).to_pylist() == []
