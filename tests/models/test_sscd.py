import io
import warnings

import numpy as np
import pytest
from PIL import Image

from curation.errors import DimensionError, WeightsError
from curation.models.sscd import ONNX_SIDE_PX, TORCHSCRIPT_SIDE_PX, SscdEncoder
from curation.models.vectors import normalised
from curation.models.weights import resolve

torch = pytest.importorskip("torch")
skimage_data = pytest.importorskip("skimage.data")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class SmallCopyNetwork(torch.nn.Module):
    """What SSCD is, small: a residual block, GeM pooling with exponent 3, a linear layer, L2 normalisation."""

    def __init__(self, dim=512):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 7, 4, 3)
        self.block = torch.nn.Sequential(
            torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
        )
        self.linear = torch.nn.Linear(16, dim)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x)) * 8  # as large as a trained network's: cubes leave float16
        x = x.clamp(min=1e-6).pow(3.0).mean((2, 3)).pow(1 / 3)
        return torch.nn.functional.normalize(self.linear(x))


def network(dim=512):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallCopyNetwork(dim).eval()


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


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A scripted file, as SSCD is published."""
    path = tmp_path_factory.mktemp("scripted") / "small.torchscript.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(network()).save(str(path))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(name, dynamic=..., half=...)``: an ONNX file of the same network."""
    pytest.importorskip("onnx", reason="exporting needs the package onnx")
    folder = tmp_path_factory.mktemp("exported")

    def export(name, dynamic=True, half=False, side_px=64):
        path = folder / name
        model, x = network(), torch.zeros(2, 3, side_px, side_px)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # dynamo=True needs onnxscript as well
            torch.onnx.export(
                model.half() if half else model,
                x.half() if half else x,
                buffer,
                dynamo=False,
                input_names=["x"],
                dynamic_axes={"x": {0: "batch", 2: "height", 3: "width"}} if dynamic else None,
            )
        path.write_bytes(buffer.getvalue())
        return path

    return export


def expected(prepared):
    x_BHWC = (np.stack(prepared) / 255.0 - MEAN) / STD
    with torch.inference_mode():
        return normalised(network()(torch.tensor(x_BHWC.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy())


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


def test_torchscript_sees_normalised_squares_of_320(scripted, photos):
    encoder = SscdEncoder(resolve(str(scripted)), batch_size=3)
    prepared = [encoder.prepare(photo) for photo in photos[:2]]

    assert encoder.side_px == TORCHSCRIPT_SIDE_PX == prepared[0].shape[0] == prepared[0].shape[1]
    np.testing.assert_allclose(encoder(prepared), expected(prepared), atol=1e-5)


@pytest.mark.parametrize(("precision", "close"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_lower_precision_changes_descriptors_a_little_and_loses_none(precision, close, scripted, photos):
    prepared = [np.asarray(Image.fromarray(photo).resize((96, 96))) for photo in photos]
    exact = SscdEncoder(resolve(str(scripted)), 4, 96)(prepared)

    rough = SscdEncoder(resolve(str(scripted)), 4, 96, precision=precision)(prepared)

    cosines = (exact * rough).sum(axis=1)
    assert (cosines > 1 - close).all()
    assert (rough != exact).any(), "the setting did nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_the_descriptors_of_the_cpu(precision, scripted, photos):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    encoder = SscdEncoder(resolve(str(scripted)), 4, device="cuda", precision=precision)
    prepared = [encoder.prepare(photo) for photo in photos]

    assert ((expected(prepared) * encoder(prepared)).sum(axis=1) > 0.98).all()


def test_an_exported_onnx_is_fed_normalised_floats(exported, photos):
    encoder = SscdEncoder(resolve(str(exported("any.onnx"))), batch_size=3)
    prepared = [encoder.prepare(photo) for photo in photos[:2]]

    assert encoder.side_px == ONNX_SIDE_PX
    np.testing.assert_allclose(encoder(prepared), expected(prepared), atol=1e-5)


def test_an_onnx_in_half_precision_is_fed_halves(exported, photos):
    encoder = SscdEncoder(resolve(str(exported("half.onnx", half=True))), batch_size=2, side_px=64)
    prepared = [encoder.prepare(photo) for photo in photos[:2]]
    descriptors = encoder(prepared)

    finite = np.isfinite(descriptors).all(axis=1)  # cubes beyond 65504 have no direction, and say so
    assert ((descriptors * expected(prepared)).sum(axis=1)[finite] > 0.99).all()


def test_an_onnx_of_a_fixed_size_brings_its_own_side_and_refuses_others(exported):
    weights = resolve(str(exported("fixed.onnx", dynamic=False)))

    assert SscdEncoder(weights, batch_size=2).side_px == 64
    with pytest.raises(WeightsError, match=r"images of \[64, 64\] px"):
        SscdEncoder(weights, batch_size=2, side_px=288)
    with pytest.raises(WeightsError, match="takes batches of 2"):
        SscdEncoder(weights, batch_size=8)


def test_an_onnx_has_its_own_precision(exported):
    with pytest.raises(WeightsError, match="an ONNX file has its own precision"):
        SscdEncoder(resolve(str(exported("own.onnx"))), precision="fp16")


def test_an_onnx_that_takes_no_images_is_refused():
    try:
        weights = resolve("opennsfw")
    except WeightsError as error:
        pytest.skip(str(error))

    encoder = SscdEncoder(weights, batch_size=1, side_px=224)
    with pytest.raises((WeightsError, DimensionError)):
        encoder([np.zeros((224, 224, 3), np.uint8)])


def test_a_model_with_another_number_of_dimensions_is_refused(tmp_path):
    path = tmp_path / "large.torchscript.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(network(1024)).save(str(path))

    encoder = SscdEncoder(resolve(str(path)), batch_size=1, side_px=64)
    with pytest.raises(DimensionError, match="1024"):
        encoder([np.zeros((64, 64, 3), np.uint8)])


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
