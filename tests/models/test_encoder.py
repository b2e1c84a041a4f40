import pickle
import subprocess
import sys

import numpy as np
import pytest

from curation.errors import WeightsError
from curation.models import torchvision_shim
from curation.models.encoder import ImageEncoder
from curation.models.weights import resolve

skimage_data = pytest.importorskip("skimage.data")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def timm():
    torchvision_shim.prepare()
    import timm

    return timm


@pytest.fixture(scope="module")
def encoder():
    return ImageEncoder("tf_efficientnet_lite0", resolve("efficientnet-lite0"), batch_size=3)


@pytest.fixture(scope="module")
def photos():
    return [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee(), skimage_data.rocket()]


def test_features_have_the_models_dimension_and_unit_length(encoder, photos):
    rows = encoder([encoder.prepare(photo) for photo in photos[:3]])

    assert rows.shape == (3, encoder.dim) == (3, 1280)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert encoder.side_px == 224
    assert encoder.license == "Apache-2.0"


def test_weights_of_another_library_land_in_the_right_layers(timm):
    weights = resolve("efficientnet-lite0")
    state = [v for k, v in torch.load(weights.path, weights_only=True).items() if "num_batches" not in k]
    network = timm.create_model("tf_efficientnet_lite0").eval()
    names = [name for name in network.state_dict() if "num_batches" not in name]
    network.load_state_dict(dict(zip(names, state, strict=True)), strict=False)
    encoder = ImageEncoder("tf_efficientnet_lite0", weights, batch_size=1)
    cat = encoder.prepare(skimage_data.chelsea())

    with torch.inference_mode():
        x = torch.tensor(cat.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
        best = network(x)[0].topk(3).indices.tolist()

    assert set(best) & {281, 282, 285, 287}  # ImageNet's cats
    feature = network.forward_head(network.forward_features(x), pre_logits=True).detach().numpy()
    assert (encoder([cat]) @ feature[0] / np.linalg.norm(feature)).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_feature_does_not_depend_on_its_batch(batch_size, encoder, photos):
    prepared = [encoder.prepare(photo) for photo in photos]
    alone = np.concatenate([encoder([one]) for one in prepared])

    starts = range(0, len(prepared), batch_size)
    together = np.concatenate([encoder(prepared[start : start + batch_size]) for start in starts])

    assert (together == alone).all()


def test_preparation_is_the_models_own_evaluation_transform(timm, encoder, photos):
    config = timm.data.resolve_model_data_config(timm.create_model("tf_efficientnet_lite0"))
    transform = timm.data.create_transform(**config, is_training=False)
    from PIL import Image

    for photo in photos:
        expected = (transform(Image.fromarray(photo)).numpy().transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(encoder.prepare(photo) - expected).mean() < 2.5


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_state_dict_of_any_timm_model_loads_at_another_side(suffix, timm, tmp_path, photos):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    path = tmp_path / f"vit{suffix}"
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    if suffix == ".pt":
        torch.save({"teacher": state}, path)
    else:
        save_file(state, path)

    encoder = ImageEncoder("test_vit", resolve(str(path)), side_px=96, batch_size=2)

    assert encoder.side_px == 96
    rows = encoder([encoder.prepare(photo) for photo in photos[:2]])
    assert rows.shape == (2, encoder.dim)
    assert np.isfinite(rows).all()


def test_weights_of_another_model_are_refused():
    with pytest.raises(WeightsError, match="another model"):
        ImageEncoder("test_vit", resolve("efficientnet-lite0"))


def test_an_unknown_model_is_refused():
    with pytest.raises(WeightsError, match="knows no such model"):
        ImageEncoder("no_such_model", None)


def test_a_non_commercial_model_of_the_hub_needs_its_licence_named():
    with pytest.raises(WeightsError, match=r"cc-by-nc-4\.0"):
        ImageEncoder("vit_huge_patch16_gap_448.in1k_ijepa", None)


class _Payload:
    def __reduce__(self):
        return (open, ("/nonexistent-evidence-of-execution", "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"x": _Payload()}, path)
    with pytest.raises(WeightsError, match="cannot be read as tensors"):
        ImageEncoder("test_vit", resolve(str(path)))
    path.write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(WeightsError, match="cannot be read as tensors"):
        ImageEncoder("test_vit", resolve(str(path)))


def test_timm_imports_whatever_torchvision_is_installed():
    script = "from curation.models import torchvision_shim as s; s.prepare(); s.prepare(); import timm, torchvision"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
