import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from curation.config.selection import EmbedConfig
from curation.encoder_presets import PRESETS
from curation.errors import WeightsError
from curation.models import networks, torchvision_shim
from curation.models.encoder import ImageEncoder
from curation.models.networks import check
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
    return ImageEncoder(EmbedConfig(batch_size=3), resolve("efficientnet-lite0"))


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
    encoder = ImageEncoder(EmbedConfig(batch_size=1), weights)
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

    encoder = ImageEncoder(EmbedConfig(model="test_vit", side_px=96, batch_size=2), resolve(str(path)))

    assert encoder.side_px == 96
    rows = encoder([encoder.prepare(photo) for photo in photos[:2]])
    assert rows.shape == (2, encoder.dim)
    assert np.isfinite(rows).all()


def test_weights_of_another_model_are_refused():
    with pytest.raises(WeightsError, match="another model"):
        ImageEncoder(EmbedConfig(model="test_vit"), resolve("efficientnet-lite0"))


def test_an_unknown_model_is_refused():
    with pytest.raises(WeightsError, match="knows no such model"):
        ImageEncoder(EmbedConfig(model="no_such_model"), resolve("efficientnet-lite0"))
    with pytest.raises(WeightsError, match="knows no such model"):
        resolve("timm:no_such_model")


def test_a_non_commercial_model_of_the_hub_needs_its_licence_named():
    with pytest.raises(WeightsError, match=r"cc-by-nc-4\.0"):
        resolve("timm:vit_huge_patch16_gap_448.in1k_ijepa")


class _Payload:
    def __reduce__(self):
        return (open, ("/nonexistent-evidence-of-execution", "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"x": _Payload()}, path)
    with pytest.raises(WeightsError, match="cannot be read as tensors"):
        ImageEncoder(EmbedConfig(model="test_vit"), resolve(str(path)))
    path.write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(WeightsError, match="cannot be read as tensors"):
        ImageEncoder(EmbedConfig(model="test_vit"), resolve(str(path)))


def test_timm_imports_whatever_torchvision_is_installed():
    script = "from curation.models import torchvision_shim as s; s.prepare(); s.prepare(); import timm, torchvision"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr


def _saved(network, path, metadata=None):
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path, metadata=metadata)
    return resolve(str(path))


@pytest.fixture(scope="module")
def vit(timm, tmp_path_factory):
    """A vision transformer with class token and seeded random weights: the network and its file."""
    torch.manual_seed(1)
    network = timm.create_model("test_vit", num_classes=0).eval()
    return network, _saved(network, tmp_path_factory.mktemp("vit") / "vit.safetensors")


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_features_are_the_class_token_the_mean_patch_or_both(vit, photos):
    network, weights = vit
    rows = {}
    for features in ("default", "cls", "pooled", "both"):
        encoder = ImageEncoder(EmbedConfig(model="test_vit", features=features, batch_size=2), weights)
        prepared = [encoder.prepare(photo) for photo in photos[:2]]
        rows[features] = encoder(prepared)
    with torch.inference_mode():
        x = torch.tensor(np.stack(prepared).transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
        tokens = network.forward_features(x).numpy()

    cls, pooled = _unit(tokens[:, 0]), _unit(tokens[:, 1:].mean(axis=1))
    assert encoder.dim == 2 * network.num_features
    np.testing.assert_allclose(rows["cls"], cls, atol=1e-5)
    np.testing.assert_allclose(rows["pooled"], pooled, atol=1e-5)
    np.testing.assert_allclose(rows["both"], np.concatenate([cls, pooled], axis=1) / np.sqrt(2), atol=1e-5)
    np.testing.assert_allclose(rows["default"], cls, atol=1e-5)  # what this one puts before its classifier


@pytest.mark.parametrize("features", ["cls", "both"])
def test_a_model_without_class_token_is_refused_before_anything_runs(features):
    config = EmbedConfig(features=features)

    with pytest.raises(WeightsError, match="has no class token; use pooled or default"):
        check(config)
    with pytest.raises(WeightsError, match="has no class token"):
        ImageEncoder(config, resolve("efficientnet-lite0"))


def test_a_model_that_gives_no_tokens_of_patches_has_no_mean_of_them(timm, tmp_path):
    weights = _saved(timm.create_model("pit_ti_224", num_classes=0), tmp_path / "pit.safetensors")

    with pytest.raises(WeightsError, match=r"no tokens of patches for embed\.features pooled"):
        ImageEncoder(EmbedConfig(model="pit_ti_224", features="pooled", batch_size=1), weights)


def test_a_side_that_patches_do_not_divide_is_refused_with_the_nearest_that_they_do():
    with pytest.raises(WeightsError, match="patches of 14 pixels; use 224"):
        check(EmbedConfig(model="vit_small_patch14_dinov2.lvd142m", side_px=222))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_model_that_this_timm_has_with_the_features_that_it_names(name):
    config = EmbedConfig(preset=name)

    check(config)

    assert config.model == PRESETS[name]["model"]


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"channels_last": False}])
def test_other_arithmetic_gives_the_same_directions(change, encoder, photos):
    other = ImageEncoder(EmbedConfig(batch_size=3, **change), resolve("efficientnet-lite0"))
    prepared = [encoder.prepare(photo) for photo in photos[:3]]

    cosines = (encoder(prepared) * other(prepared)).sum(axis=1)

    assert (cosines > (0.998 if "precision" in change else 0.99999)).all()
    first = next(other._network.parameters())
    assert first.dtype == (torch.bfloat16 if "precision" in change else torch.float32)
    assert first.is_contiguous(memory_format=torch.channels_last) is ("channels_last" not in change)


def test_bf16_changes_the_features_a_little(encoder, photos):
    other = ImageEncoder(EmbedConfig(batch_size=3, precision="bf16"), resolve("efficientnet-lite0"))
    prepared = [encoder.prepare(photo) for photo in photos[:1]]

    assert not (other(prepared) == encoder(prepared)).all()
    assert other.identity != encoder.identity


def test_a_file_as_its_authors_published_it_is_converted(timm, tmp_path, photos):
    torch.manual_seed(2)
    network = timm.create_model("vit_small_patch14_reg4_dinov2", depth=1, num_classes=0, img_size=28)
    state = {key.replace("reg_token", "register_tokens"): value for key, value in network.state_dict().items()}
    cls_embedding = torch.randn(1, 1, 384)
    state["pos_embed"] = torch.cat([cls_embedding, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "published.pth")

    converted = networks._converted("vit_small_patch14_reg4_dinov2", tmp_path / "published.pth", depth=1, img_size=28)

    torch.testing.assert_close(converted.cls_token, network.cls_token + cls_embedding)
    torch.testing.assert_close(converted.pos_embed, network.pos_embed)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_what_our_trainer_exports_is_an_encoder(ffn, tmp_path, photos):
    from curation.dinov2 import export
    from curation.dinov2.checkpoint import write_tensors
    from curation.dinov2.config import ModelConfig
    from curation.dinov2.model import VisionTransformer

    torch.manual_seed(3)
    model = ModelConfig(dim=24, depth=2, heads=2, patch_px=8, ffn=ffn, registers=2, layer_scale=1.0)
    backbone = VisionTransformer(model, 32).eval()
    path = tmp_path / "teacher.safetensors"
    write_tensors(path, export.timm_state(backbone), export.metadata(backbone, 7))

    config = EmbedConfig(model="curation-dinov2", weights=str(path), features="cls", batch_size=2)
    encoder = ImageEncoder(config, resolve(str(path)))
    prepared = [encoder.prepare(photo) for photo in photos[:2]]

    assert (encoder.side_px, encoder.short_px, encoder.dim) == (32, 32, 24)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = torch.tensor(((np.stack(prepared) / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.inference_mode():
        expected = timm_features(path, x)
    np.testing.assert_allclose(encoder(prepared), _unit(expected), atol=1e-4)
    assert ImageEncoder(config.model_copy(update={"side_px": 64}), resolve(str(path))).side_px == 64


def timm_features(path, x):
    """Class tokens of the exported network, loaded by timm as its documentation says."""
    import json

    import timm.layers
    from safetensors import safe_open
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["model"])
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    network = VisionTransformer(**about["timm_arguments"], **(layers if about["config"]["ffn"] == "swiglu" else {}))
    network.load_state_dict(load_file(path))
    return network.eval()(x).numpy()


def test_another_safetensors_file_is_no_export_of_our_trainer(vit):
    with pytest.raises(WeightsError, match=r"give its teacher\.safetensors"):
        ImageEncoder(EmbedConfig(model="curation-dinov2"), vit[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_a_compiled_model_gives_the_same_directions(vit, photos):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain, compiled = (
        ImageEncoder(EmbedConfig(model="test_vit", batch_size=2, compile=value), vit[1]) for value in (False, True)
    )
    prepared = [plain.prepare(photo) for photo in photos[:2]]

    np.testing.assert_allclose(compiled(prepared), plain(prepared), atol=1e-5)
    assert compiled._run is not compiled._read


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_gpu_gives_the_directions_of_the_cpu(precision, vit, photos):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    config = EmbedConfig(model="test_vit", batch_size=2, precision=precision)
    here, there = ImageEncoder(config, vit[1]), ImageEncoder(config, vit[1], device="cuda")
    prepared = [here.prepare(photo) for photo in photos[:2]]

    assert ((here(prepared) * there(prepared)).sum(axis=1) > 0.999).all()


def test_a_gpu_that_is_not_there_is_said(vit):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(WeightsError, match="this torch sees no GPU"):
        ImageEncoder(EmbedConfig(model="test_vit"), vit[1], device="cuda")
