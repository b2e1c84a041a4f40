import numpy as np
import pytest
from PIL import Image

from curation.errors import WeightsError
from curation.models.sscd import SscdEncoder
from curation.models.vectors import normalised
from curation.models.weights import resolve

skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def encoder():
    try:
        weights = resolve("immaculate-sscd")
    except WeightsError as error:
        pytest.skip(str(error))
    return SscdEncoder(weights, batch_size=3)


@pytest.fixture(scope="module")
def photos():
    return [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee(), skimage_data.rocket()]


def test_a_copy_is_close_and_another_photo_is_not(encoder, photos):
    astronaut = Image.fromarray(photos[0])
    copy = np.asarray(astronaut.crop((30, 30, 490, 490)).convert("L").convert("RGB").resize((300, 300)))

    original, edited, other = encoder([encoder.prepare(rgb) for rgb in (photos[0], copy, photos[1])])

    assert original @ edited > 0.75
    assert original @ other < 0.4
    assert np.linalg.norm(original) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_descriptor_does_not_depend_on_its_batch(batch_size, encoder, photos):
    prepared = [encoder.prepare(photo) for photo in photos]
    alone = np.concatenate([encoder([one]) for one in prepared])

    starts = range(0, len(prepared), batch_size)
    together = np.concatenate([encoder(prepared[start : start + batch_size]) for start in starts])

    assert (together == alone).all()
    assert together.shape == (4, 512)


def test_torchscript_files_are_read_as_well(tmp_path, photos):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 512))
    path = tmp_path / "tiny.torchscript.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(network.eval(), torch.zeros(1, 3, 64, 64)).save(str(path))

    encoder = SscdEncoder(resolve(str(path)), batch_size=2, side_px=64)
    rows = encoder([encoder.prepare(photos[0])])

    x_CHW = (encoder.prepare(photos[0]) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        expected = network(torch.tensor(x_CHW.transpose(2, 0, 1)[None], dtype=torch.float32)).numpy()
    np.testing.assert_allclose(rows, normalised(expected), atol=1e-5)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(b"not a model")

    with pytest.raises(WeightsError, match="not a TorchScript file"):
        SscdEncoder(resolve(str(path)))


def test_rows_without_a_direction_become_nan_and_others_unit_length():
    rows = normalised(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]], dtype=np.float32))

    assert rows[0].tolist() == pytest.approx([0.6, 0.8])
    assert np.isnan(rows[1:]).all()
    assert rows.dtype == np.float32
