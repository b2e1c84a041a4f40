import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from curation.dinov2 import export
from curation.dinov2.config import ModelConfig
from curation.dinov2.drop_path import kept_rows, moved
from curation.dinov2.model import Kept, VisionTransformer
from curation.dinov2.network import student_and_teacher, update_teacher
from curation.errors import DimensionError
from curation.models import torchvision_shim

TINY = {"dim": 24, "depth": 2, "heads": 2, "patch_px": 8, "layer_scale": 0.5}


def images(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, height, width, generator=generator) for height, width in sizes]


@pytest.mark.parametrize(
    ("arch", "millions"), [("tiny", 5.7), ("small", 22.1), ("base", 86.6), ("large", 304.4), ("giant", 1136.5)]
)
def test_each_size_has_the_published_number_of_parameters(arch, millions):
    with torch.device("meta"):
        ffn = "swiglu" if arch == "giant" else "mlp"
        model = VisionTransformer(ModelConfig(arch=arch, patch_px=14, ffn=ffn), 518)
    count = sum(p.numel() for name, p in model.named_parameters() if name != "mask_token")

    assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_a_non_square_image_is_encoded():
    model = VisionTransformer(ModelConfig(**TINY, registers=3), 32)
    (features,) = model(images((16, 40)))

    assert features.patches_NPD.shape == (2, 10, 24)
    assert features.registers_NRD.shape == (2, 3, 24)


def test_images_that_do_not_fit_the_patches_or_channels_are_refused():
    model = VisionTransformer(ModelConfig(**TINY, channels=2), 32)

    assert model([torch.zeros(1, 2, 8, 24)])[0].patches_NPD.shape == (1, 3, 24)
    for shape in ((1, 3, 16, 16), (1, 2, 16, 20)):
        with pytest.raises(DimensionError, match="must have 2 channels and sides that are multiples of 8 pixels"):
            model([torch.zeros(shape)])


@pytest.mark.parametrize("drops", [False, True])
def test_chosen_tokens_are_those_of_the_whole_forward_pass(drops):
    model = VisionTransformer(ModelConfig(**TINY, registers=3), 16)
    views = images((16, 16), (8, 16))
    masks = [torch.tensor([[True, False, False, True], [False] * 4]), None]
    one, both = Kept(torch.tensor([1]), 2.0), Kept(torch.tensor([0, 1]), 1.0)
    kept = [[(one, both), (both, one)], [(both, one), (one, one)]] if drops else None
    patches = torch.tensor([0, 3, 6])

    whole = model(views, masks, kept)
    cls_ND, chosen_MD = model.chosen(views, masks, kept, patches)
    torch.testing.assert_close(cls_ND, torch.cat([features.cls_ND for features in whole]))
    torch.testing.assert_close(chosen_MD, whole[0].patches_NPD.flatten(0, 1)[patches])
    assert model.chosen(views, masks, kept, None)[1].shape == (0, 24)


def test_the_mask_token_hides_a_patch():
    model = VisionTransformer(ModelConfig(**TINY), 16)
    (one,) = images((16, 16))
    other = one.clone()
    other[:, :, :8, :8] = 7.0
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 0] = True
    (a,), (b,) = model([one], [mask]), model([other], [mask])

    assert a.cls_ND.equal(b.cls_ND)
    assert not model([one])[0].cls_ND.allclose(model([other])[0].cls_ND)


def test_rows_that_do_not_run_a_block_pass_through():
    model = VisionTransformer(ModelConfig(**{**TINY, "depth": 1}), 16)
    (x,) = images((16, 16))
    kept = Kept(torch.tensor([1]), 2.0)
    (dropped,) = model([x], kept=[[(kept, kept)]])
    tokens = model._embed(x, None)

    assert dropped.cls_ND[0].equal(model.norm(tokens)[0, 0])
    assert not dropped.cls_ND[1].equal(model.norm(tokens)[1, 0])


def test_drop_path_keeps_an_exact_number_of_rows_and_depends_on_the_step(settings):
    config = settings(model__drop_path=0.3)
    one, same, other = (kept_rows(config, step, range(4)) for step in (5, 5, 6))

    for block in one:
        kept = [branch for stack in block for branch in stack]
        assert [len(rows) for rows, _ in kept] == [5, 5, 5, 5]  # 8 global and 8 local crops, 0.7 of each
        assert {scale for _, scale in kept} == {8 / 5}
    assert all(a.rows.equal(b.rows) for x, y in zip(one[0], same[0], strict=True) for a, b in zip(x, y, strict=True))
    assert not all(
        a.rows.equal(b.rows)
        for m, n in zip(one, other, strict=True)
        for x, y in zip(m, n, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert kept_rows(settings(model__drop_path=0.0), 5, range(4)) is None


def test_parts_of_a_batch_keep_the_rows_that_the_whole_batch_keeps(settings):
    config = settings(model__drop_path=0.3, data__batch_size=6)
    whole = kept_rows(config, 7, range(6))
    parts = {images: kept_rows(config, 7, images) for images in (range(4), range(4, 6))}

    for block in range(config.model.shape.depth):
        for stack in (0, 1):
            for branch in (0, 1):
                together = set()
                for images, rows in parts.items():
                    crops, places = divmod(rows[block][stack][branch].rows.numpy(), len(images))
                    together |= set((crops * 6 + places + images.start).tolist())
                    assert rows[block][stack][branch].scale == whole[block][stack][branch].scale
                assert together == set(whole[block][stack][branch].rows.tolist())


def test_kept_rows_are_moved_as_they_are(settings):
    kept = kept_rows(settings(model__drop_path=0.3), 5, range(4))
    there = moved(kept, torch.device("cpu"))

    before, after = ([one for block in rows for stack in block for one in stack] for rows in (kept, there))
    pairs = list(zip(before, after, strict=True))
    assert len(pairs) == 2 * 2 * 2
    assert all(a.rows.equal(b.rows) and a.scale == b.scale for a, b in pairs)
    assert moved(None, torch.device("cpu")) is None


def test_networks_that_are_made_at_once_are_those_of_their_seeds(settings):
    configs = [settings(seed=seed) for seed in range(4)] * 4
    alone = [student_and_teacher(config)[0].state_dict() for config in configs[:4]]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda config: student_and_teacher(config)[0].state_dict(), configs))

    for index, weights in enumerate(found):
        assert all(value.equal(alone[index % 4][name]) for name, value in weights.items())


def test_initial_weights_depend_on_the_seed_alone(settings):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    student, teacher = student_and_teacher(settings())
    torch.random.set_rng_state(torch.random.get_rng_state().roll(1))
    again, _ = student_and_teacher(settings())
    other, _ = student_and_teacher(settings(seed=1))
    torch.random.set_rng_state(before)

    for (name, a), b, c in zip(student.named_parameters(), again.parameters(), teacher.parameters(), strict=True):
        assert a.equal(b), name
        assert a.equal(c), name
        assert not c.requires_grad
    assert not other.backbone.pos_embed.equal(student.backbone.pos_embed)


def test_the_teacher_moves_by_one_minus_the_momentum(settings):
    student, teacher = student_and_teacher(settings())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = teacher.backbone.pos_embed.clone()
    update_teacher(student, teacher, 0.75)

    torch.testing.assert_close(teacher.backbone.pos_embed, before + 0.25)


def timm_vision_transformer():
    torchvision_shim.prepare()
    import timm.layers
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    return TimmVisionTransformer, timm.layers.SwiGLUPacked


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_timm_loads_the_exported_backbone_and_agrees(ffn, registers):
    timm_model, swiglu = timm_vision_transformer()
    torch.manual_seed(0)
    ours = VisionTransformer(ModelConfig(**TINY, ffn=ffn, registers=registers), 32).eval()
    with torch.no_grad():
        ours.cls_token.normal_()
    arguments = json.loads(export.metadata(ours, 3)["model"])["timm_arguments"]
    layers = {"mlp_layer": swiglu, "act_layer": torch.nn.SiLU} if ffn == "swiglu" else {}
    theirs = timm_model(**arguments, **layers).eval()
    theirs.load_state_dict(export.timm_state(ours))
    (x,) = images((32, 32))

    torch.testing.assert_close(theirs(x), ours([x])[0].cls_ND, rtol=1e-5, atol=1e-5)


def test_the_exported_file_says_what_it_is(tmp_path):
    from curation.dinov2.checkpoint import write_tensors

    model = VisionTransformer(ModelConfig(**TINY), 32)
    path = tmp_path / "teacher.safetensors"
    write_tensors(path, export.timm_state(model), export.metadata(model, 7))

    assert load_file(path)["pos_embed"].shape == (1, 17, 24)
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "7"
        assert json.loads(file.metadata()["model"])["timm_arguments"]["patch_size"] == 8
