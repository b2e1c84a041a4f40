import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from curation.config.images import ImagesConfig
from curation.dinov2 import export
from curation.dinov2.config import ModelConfig, TrainConfig
from curation.dinov2.evaluate import pictures
from curation.dinov2.evaluate.backbones import PixelBackbone, Tokens, VitBackbone, load_backbone
from curation.dinov2.evaluate.config import LabelledConfig
from curation.dinov2.evaluate.features import View, extract
from curation.dinov2.evaluate.labelled import open_labelled
from curation.dinov2.model import VisionTransformer
from curation.errors import DiskFullError, InputError, TrainError, UsageError

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    model=ModelConfig(dim=128, depth=3, heads=2, patch_px=4, layer_scale=1.0), crops={"global_px": 16, "local_px": 8}
)


def network(registers=0):
    torch.manual_seed(1)
    found = VisionTransformer(CONFIG.model.model_copy(update={"registers": registers}), 16)
    for parameter in found.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return found.eval().requires_grad_(False)


@pytest.fixture
def backbone():
    return VitBackbone("test", network(), (CONFIG.crops.mean, CONFIG.crops.std), CPU)


def pixels(num=3, side_px=16):
    return torch.randint(0, 256, (num, side_px, side_px, 3), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    ("name", "registers", "antialias", "offset"),
    [("published.pth", 0, False, 0.1), ("published.pth", 4, True, 0.0), ("timm", 0, True, 0.0), ("timm", 4, True, 0.0)],
)
def test_other_sizes_are_resized_the_way_of_who_wrote_the_file(tmp_path, name, registers, antialias, offset):
    ours = network(registers)
    ours.config = ours.config.model_copy(update={"pos_embed_antialias": antialias, "pos_embed_offset": offset})
    wanted = VitBackbone("test", ours, (CONFIG.crops.mean, CONFIG.crops.std), CPU)(pixels(2, 24), 1)
    torch.save(ours.state_dict(), tmp_path / "published.pth")
    export.export_timm(ours, CONFIG, 7, tmp_path / "timm")
    if name == "timm":  # without what our own export says of itself, as files of others are
        save_file(load_file(tmp_path / "timm/model.safetensors"), tmp_path / "timm/model.safetensors")

    loaded, _ = load_backbone(str(tmp_path / name), CPU, 0)

    torch.testing.assert_close(loaded(pixels(2, 24), 1)[0].cls_ND, wanted[0].cls_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_exports_and_published_files_are_the_network_itself(tmp_path, registers):
    ours = network(registers)
    wanted = VitBackbone("test", ours, (CONFIG.crops.mean, CONFIG.crops.std), CPU)(pixels(), 2)
    for name in ("timm", "transformers"):
        export.FORMATS[name](ours, CONFIG, 7, tmp_path / name)
    torch.save({"model": ours.state_dict()}, tmp_path / "published.pth")

    for name in ("timm", "transformers", "timm/model.safetensors", "published.pth"):
        loaded, random = load_backbone(str(tmp_path / name), CPU, 0)
        for mine, theirs in zip(wanted, loaded(pixels(), 2), strict=True):
            torch.testing.assert_close(theirs.cls_ND, mine.cls_ND, rtol=0, atol=1e-5)
            torch.testing.assert_close(theirs.patches_NPD, mine.patches_NPD, rtol=0, atol=1e-5)
        assert random(pixels(), 1)[0].cls_ND.shape == wanted[0].cls_ND.shape
        assert not torch.allclose(random(pixels(), 1)[0].cls_ND, wanted[1].cls_ND)


def test_random_weights_follow_from_the_seed_and_leave_the_state_of_others_alone(backbone):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (backbone.at_random(seed)(pixels(), 1)[0].cls_ND for seed in (0, 0, 1))

    assert torch.rand(1).equal(expected)
    assert one.equal(same)
    assert not one.equal(other)


def test_a_registered_encoder_is_a_backbone_too():
    trained, random = load_backbone("efficientnet-lite0", CPU, 0)
    (tokens,), (others,) = (found(pixels(2, 64), 4) for found in (trained, random))

    assert tokens.cls_ND.shape == others.cls_ND.shape == (2, 1280)
    torch.testing.assert_close(tokens.patches_NPD.mean(dim=1), tokens.cls_ND, rtol=1e-3, atol=1e-3)
    assert trained.attention(pixels(2, 64)) is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", UsageError, "is no backbone that can be evaluated"),
        ("traced.onnx", UsageError, "not TorchScript or ONNX"),
        ("broken.pth", TrainError, "cannot be read as tensors: Weights only load failed$"),
        ("other.safetensors", TrainError, "is not a DINOv2 vision transformer"),
    ],
)
def test_what_is_no_backbone_is_refused(tmp_path, name, error, message):
    (tmp_path / "traced.onnx").write_bytes(b"\x08\x07")
    (tmp_path / "broken.pth").write_bytes(b"no zip")
    save_file({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "other.safetensors")

    with pytest.raises(error, match=message):
        load_backbone(str(tmp_path / name), CPU, 0)


def test_attention_is_that_of_the_last_block(backbone):
    weights = network().state_dict()
    x = backbone._network
    seen = []
    handle = x.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    maps_NHP = backbone.attention(pixels(2))
    handle.remove()

    tokens = seen[-1].view(2, 17, 128)
    qkv = tokens @ weights["blocks.2.attn.qkv.weight"].T + weights["blocks.2.attn.qkv.bias"]
    for head in range(2):
        q, k = (qkv[..., part * 128 + head * 64 : part * 128 + head * 64 + 64] for part in (0, 1))
        wanted = (q[:, :1] @ k.transpose(1, 2) / 8).softmax(dim=-1)[:, 0, 1:]
        torch.testing.assert_close(maps_NHP[:, head], wanted, rtol=1e-4, atol=1e-6)


def test_pictures_are_png_files_with_a_row_an_image(tmp_path, backbone):
    shown = pixels(3).numpy()
    for name, make, columns in (
        ("attention", pictures.attention_picture, 2 + 2),  # itself, the mean, two heads
        ("components", pictures.components_picture, 2),
    ):
        pictures.write_png(tmp_path / f"{name}.png", make(backbone, shown, 32))
        with Image.open(tmp_path / f"{name}.png") as opened:
            opened.load()
            assert opened.format == "PNG"
            assert opened.size == (columns * 34 - 2, 3 * 34 - 2)
            drawn = np.asarray(opened.convert("RGB"))
        assert np.array_equal(drawn[:32:2, :32:2], shown[0])  # the image, each pixel twice
        assert drawn[:32, 34:66].std() > 5
    assert pictures.components_picture(PixelBackbone(16, CPU), shown, 32) is None


def test_components_are_those_of_a_planted_plane():
    rng = torch.Generator().manual_seed(0)
    places = torch.rand(200, 3, generator=rng) * torch.tensor([9.0, 4.0, 1.0])
    axes = torch.linalg.qr(torch.randn(12, 3, generator=rng)).Q

    found = pictures.components(places @ axes.T)

    for axis in range(3):
        correlation = np.corrcoef(found[:, axis], places[:, axis])[0, 1]
        assert abs(correlation) > 0.98


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_features_do_not_depend_on_batches_or_threads(backbone, labelled_parquet, tmp_path, batch_size):
    part = open_labelled(LabelledConfig(path=str(labelled_parquet)), 0).test
    view = View(16, 1.0, ImagesConfig())
    held = extract(backbone, part, view, num_blocks=2, batch_size=8, workers=1)
    written = extract(
        backbone, part, view, num_blocks=2, batch_size=batch_size, workers=3, scratch=tmp_path / "features"
    )

    assert held.slots_NSD.shape == (30, 3, 128)
    np.testing.assert_allclose(written.slots_NSD, held.slots_NSD, atol=2e-5)
    assert written.label_N.tolist() == part.label_N.tolist()


def test_few_large_images_are_encoded_at_a_time(labelled_parquet):
    part = open_labelled(LabelledConfig(path=str(labelled_parquet)), 0).test
    pixels = PixelBackbone(2048, CPU)
    seen = []

    class Watched:
        name, side_px, patch_px = pixels.name, pixels.side_px, 1

        def __call__(self, pixels_NHW3, num_blocks):
            seen.append(len(pixels_NHW3))
            return [Tokens(pixels_NHW3[:, 0, :8, 0].float(), None)]

    extract(Watched(), part, View(2048, 1.0, ImagesConfig()), num_blocks=1, batch_size=64, workers=1)

    assert max(seen) == 64 * 518**2 // 2048**2
    assert sum(seen) == 30


def test_images_that_cannot_be_decoded_are_left_out_and_counted(backbone, rows, tmp_path, write_parquet):
    broken = [dict(row) for row in rows[:12]]
    broken[4]["image"] = {"bytes": b"no image", "path": None}
    broken[7]["image"] = {"bytes": None, "path": "elsewhere.png"}
    path = write_parquet(tmp_path / "some.parquet", broken)
    part = open_labelled(LabelledConfig(path=str(path)), 0, needs_labels=False).test
    found = extract(backbone, part, View(16, 1.0, ImagesConfig()), num_blocks=1, batch_size=5, workers=2)

    assert (len(found), found.num_unreadable) == (10, 2)

    nothing = write_parquet(tmp_path / "none.parquet", [{**broken[4]}])
    part = open_labelled(LabelledConfig(path=str(nothing)), 0, needs_labels=False).test
    with pytest.raises(InputError, match="none of 1 images can be decoded"):
        extract(backbone, part, View(16, 1.0, ImagesConfig()), num_blocks=1, batch_size=5, workers=2)


def test_features_that_do_not_fit_on_the_disk_are_one_clear_line(backbone, labelled_parquet, small_disk):
    part = open_labelled(LabelledConfig(path=str(labelled_parquet)), 0).test
    large = PixelBackbone(256, CPU)  # 30 images of 786 kB

    with pytest.raises(DiskFullError, match=r"no space for 0\.0 GB of features"):
        extract(large, part, View(256, 1.0, ImagesConfig()), num_blocks=1, batch_size=5, workers=1,
                scratch=small_disk / "features")  # fmt: skip


def test_the_view_is_the_central_square():
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 20:60] = 255
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")

    seen = View(20, 1.0, ImagesConfig())(file.getvalue())

    assert seen.shape == (20, 20, 3)
    assert seen[:, 1:-1].min() == 255  # the filter reaches over the square's edge


def test_a_network_for_grey_images_sees_luma():
    torch.manual_seed(0)
    grey = VisionTransformer(CONFIG.model.model_copy(update={"channels": 1}), 16)
    backbone = VitBackbone("grey", grey, ((0.4,), (0.2,)), CPU)

    luma = (pixels().float() @ torch.tensor([0.299, 0.587, 0.114]) / 255 - 0.4) / 0.2
    wanted = grey([luma.unsqueeze(1)])[0].cls_ND

    torch.testing.assert_close(backbone(pixels(), 1)[0].cls_ND, wanted, rtol=1e-4, atol=1e-5)
    assert backbone.at_random(1)(pixels(), 1)[0].cls_ND.shape == wanted.shape
