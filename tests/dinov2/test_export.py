"""What others load gives what the trainer's own backbone gives."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from curation.dinov2 import export, names, published
from curation.dinov2.config import ModelConfig, TrainConfig
from curation.dinov2.model import VisionTransformer
from curation.dinov2.train import train
from curation.errors import DimensionError, DiskFullError, TrainError
from curation.models import torchvision_shim

SHAPE = {"dim": 24, "depth": 2, "heads": 2, "patch_px": 14, "layer_scale": 0.5}


def conditioned(side_px=224, **changes):
    """Return a backbone whose every weight matters, and its settings."""
    model = ModelConfig(**{**SHAPE, **changes})
    config = TrainConfig(model=ModelConfig(**SHAPE), crops={"global_px": side_px})
    torch.manual_seed(0)
    backbone = VisionTransformer(model, side_px).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone, config


def image(side_px, channels=3, **_):
    return torch.randn(2, channels, side_px, side_px, generator=torch.Generator().manual_seed(side_px))


def test_there_may_be_any_number_of_channels():
    """Names convert there and back with each, and every channel counts."""
    for channels in (1, 2, 4, 6):
        backbone, _ = conditioned(56, channels=channels)
        x = image(56, channels)
        seen = backbone([x])[0].cls_ND
        for to in (names.to_timm, names.to_transformers):
            again, _ = conditioned(56, channels=channels)
            again.patch_embed.proj.weight.zero_()
            again.load_state_dict(names.ours(to(backbone.state_dict())))
            assert again([x])[0].cls_ND.equal(seen)
        for channel in range(channels):
            other = x.clone()
            other[:, channel] += 1
            assert not backbone([other])[0].cls_ND.allclose(seen, atol=1e-3)
        with pytest.raises(DimensionError, match=f"must have {channels} channels"):
            backbone([image(56, channels + 1)])


def shapes():
    return pytest.mark.parametrize(
        ("registers", "ffn", "side_px"),
        [(0, "mlp", 224), (4, "mlp", 224), (4, "swiglu", 224), (0, "mlp", 518), (4, "mlp", 518)],
    )


@shapes()
@pytest.mark.parametrize("shown_px", [224, 518])
def test_timm_agrees(tmp_path, registers, ffn, side_px, shown_px):
    torchvision_shim.prepare()
    import timm

    backbone, config = conditioned(side_px, registers=registers, ffn=ffn)
    export.export_timm(backbone, config, 3, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = backbone([image(shown_px)])[0]
    tokens = theirs.forward_features(image(shown_px))

    torch.testing.assert_close(theirs(image(shown_px)), ours.cls_ND, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1 + registers :], ours.patches_NPD, rtol=0, atol=1e-5)
    assert tuple(theirs.pretrained_cfg["mean"]) == config.crops.mean


@pytest.mark.parametrize(
    ("registers", "ffn", "side_px", "antialias"),
    [
        (0, "mlp", 224, True),
        (0, "mlp", 224, False),
        (0, "mlp", 518, True),
        (0, "mlp", 518, False),
        (4, "mlp", 224, True),
        (4, "swiglu", 224, True),
        (4, "mlp", 518, True),
    ],
)
def test_transformers_agrees(tmp_path, registers, ffn, side_px, antialias):
    torchvision_shim.prepare()
    transformers = pytest.importorskip("transformers")
    backbone, config = conditioned(side_px, registers=registers, ffn=ffn, pos_embed_antialias=antialias)
    export.export_transformers(backbone, config, 3, tmp_path)
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(report.values()), report
    for shown_px in (224, 518):
        ours = backbone([image(shown_px)])[0]
        tokens = theirs.eval()(image(shown_px)).last_hidden_state
        torch.testing.assert_close(tokens[:, 0], ours.cls_ND, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:, 1 + registers :], ours.patches_NPD, rtol=0, atol=1e-5)


def test_what_transformers_would_make_otherwise_is_refused(tmp_path):
    for changes, reason in (
        ({"mlp_ratio": 2.5}, "takes whole numbers; use --format timm"),
        ({"pos_embed_offset": 0.1}, "knows no offset"),
        ({"registers": 4, "pos_embed_antialias": False}, "always antialiases where there are registers"),
    ):
        backbone, config = conditioned(**changes)
        with pytest.raises(TrainError, match=reason):
            export.export_transformers(backbone, config, 3, tmp_path)


def test_timm_takes_no_other_size_where_it_would_resize_otherwise(tmp_path):
    torchvision_shim.prepare()
    import timm

    backbone, config = conditioned(56, pos_embed_antialias=False)
    export.export_timm(backbone, config, 3, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()

    torch.testing.assert_close(theirs(image(56)), backbone([image(56)])[0].cls_ND, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="doesn't match model"):
        theirs(image(112))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_file_may_be_for_images_of_another_size(tmp_path):
    backbone, config = conditioned(224, registers=4)
    export.export_torchscript(export.at_size(backbone, 518), config, 3, tmp_path / "model.pt")
    cls_ND, _ = torch.jit.load(tmp_path / "model.pt")(image(518))

    torch.testing.assert_close(cls_ND, backbone([image(518)])[0].cls_ND, rtol=0, atol=1e-5)
    for side_px in (500, 14_000_000):
        with pytest.raises(
            TrainError, match=f"--image-px {side_px} must be a multiple of the patch, 14, of at most 8192"
        ):
            export.at_size(backbone, side_px)


@pytest.mark.parametrize(("kind", "channels"), [("timm", 4), ("timm", 6), ("transformers", 4), ("transformers", 6)])
def test_other_numbers_of_channels_and_sides_that_differ_agree_too(tmp_path, kind, channels):
    torchvision_shim.prepare()
    import timm
    import transformers

    backbone, config = conditioned(224, channels=channels, registers=4)
    export.FORMATS[kind](backbone, config, 3, tmp_path)
    x = torch.randn(2, channels, 112, 266, generator=torch.Generator().manual_seed(0))
    if kind == "timm":
        tokens = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval().forward_features(x)
    else:
        tokens = transformers.AutoModel.from_pretrained(tmp_path).eval()(x).last_hidden_state
    ours = backbone([x])[0]

    torch.testing.assert_close(tokens[:, 0], ours.cls_ND, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 5:], ours.patches_NPD, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("channels", [3, 6])
def test_torchscript_agrees_for_any_number_of_images(tmp_path, channels):
    backbone, config = conditioned(56, registers=2, channels=channels)
    export.export_torchscript(backbone, config, 3, tmp_path / "model.pt")
    theirs = torch.jit.load(tmp_path / "model.pt")
    for x in (image(56, channels), image(56, channels)[:1]):
        cls_ND, patches_NPD = theirs(x)
        ours = backbone([x])[0]
        torch.testing.assert_close(cls_ND, ours.cls_ND, rtol=0, atol=1e-5)
        torch.testing.assert_close(patches_NPD, ours.patches_NPD, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("side_px", "changes"),
    [
        (518, {"registers": 4, "channels": 4}),
        pytest.param(518, {}, marks=pytest.mark.slow),
        pytest.param(224, {"registers": 2, "ffn": "swiglu", "channels": 6}, marks=pytest.mark.slow),
        pytest.param(224, {}, marks=pytest.mark.slow),
    ],
)
def test_onnx_agrees_for_any_number_of_images(tmp_path, side_px, changes):
    pytest.importorskip("onnxscript")
    import onnxruntime

    backbone, config = conditioned(side_px, **changes)
    export.export_onnx(backbone, config, 3, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x in (image(side_px, **changes), image(side_px, **changes)[:1]):
        cls_ND, patches_NPD = session.run(None, {"images": x.numpy()})
        ours = backbone([x])[0]
        torch.testing.assert_close(torch.from_numpy(cls_ND), ours.cls_ND, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(patches_NPD), ours.patches_NPD, rtol=0, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["mean"]) == list(config.crops.mean)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_an_export_that_does_not_fit_leaves_what_was_there(tmp_path, monkeypatch, kind):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    backbone, config = conditioned(56)
    output = tmp_path / "model"
    output.write_text("before")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    monkeypatch.setattr("torch.onnx.ONNXProgram.save", no_space)
    with pytest.raises(DiskFullError, match="no space left for model; free some and run the command again"):
        export.FORMATS[kind](backbone, config, 3, output)

    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert output.read_text() == "before"


@shapes()
@pytest.mark.parametrize("to", [names.to_timm, names.to_transformers, dict])
def test_names_convert_there_and_back(registers, ffn, side_px, to):
    backbone, _ = conditioned(side_px, registers=registers, ffn=ffn)
    back = names.ours(to(backbone.state_dict()))
    again, _ = conditioned(side_px, registers=registers, ffn=ffn)
    again.load_state_dict(back)
    x = image(56)

    torch.testing.assert_close(again([x])[0].cls_ND, backbone([x])[0].cls_ND, rtol=0, atol=1e-5)


def test_blocks_in_chunks_are_numbered_through(tmp_path):
    backbone, _ = conditioned(56)
    state = {
        name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v
        for name, v in backbone.state_dict().items()
    }
    save_file(state, tmp_path / "chunked.safetensors")
    other, _ = conditioned(56)
    other.pos_embed.zero_()
    published.load_weights(other, tmp_path / "chunked.safetensors")

    assert other.pos_embed.equal(backbone.pos_embed)


def test_position_embeddings_are_resized_to_another_grid(tmp_path):
    backbone, _ = conditioned(56)
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    larger, _ = conditioned(112)
    published.load_weights(larger, tmp_path / "model.safetensors")

    torch.testing.assert_close(larger.pos_embed, backbone.positions(8, 8))


def test_weights_of_another_network_are_refused(tmp_path):
    backbone, _ = conditioned(56, dim=48)
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no tensors")

    for name, reason in (("model", "another network"), ("no", "cannot be read"), ("missing", "cannot be read")):
        with pytest.raises(TrainError, match=reason):
            published.load_weights(conditioned(56)[0], tmp_path / f"{name}.safetensors")


def test_a_runs_backbone_is_read_from_its_newest_checkpoint(manifest, settings, tmp_path):
    result = train(
        manifest, settings(schedule__steps=2, schedule__warmup_steps=1), tmp_path, resume=False, device="cpu"
    )
    teacher, config, step = export.read_backbone(tmp_path)
    student, _, _ = export.read_backbone(tmp_path, "student")
    stored = load_file(result.checkpoint)

    assert (step, config.model.dim) == (2, 24)
    assert teacher.pos_embed.equal(stored["teacher/backbone.pos_embed"])
    assert student.pos_embed.equal(stored["student/backbone.pos_embed"])
    with pytest.raises(TrainError, match="holds no checkpoint"):
        export.read_backbone(tmp_path / "nothing")
