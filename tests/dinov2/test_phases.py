"""What a run begins with and learns from: other runs, published backbones, frozen teachers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from curation.dinov2 import export, names, phases, published
from curation.dinov2.centring import Centrings
from curation.dinov2.model import VisionTransformer
from curation.dinov2.network import student_and_teacher
from curation.dinov2.objective import Inputs, objective, teacher_targets
from curation.dinov2.schedules import Schedules
from curation.dinov2.train import train
from curation.errors import TrainError

SHORT = {"schedule__steps": 4, "schedule__warmup_steps": 1}
WHOLE = {"model__drop_path": 0.0, "losses": {"masked_share": 0}}


def trained(manifest, config, output, **options):
    return train(manifest, config, output, device="cpu", **({"resume": False} | options))


def stop_after(steps):
    seen = []
    return lambda: seen.append(1) or len(seen) == steps


def tensors(output):
    return load_file(max((output / "checkpoints").glob("*.safetensors")))


def assert_resumed_to_the_bit(manifest, config, folder, between=lambda: None, stop=2):
    """Train at once, and with a stop after some steps; return the tensors."""
    trained(manifest, config, folder / "whole")
    trained(manifest, config, folder / "parts", should_stop=stop_after(stop))
    between()
    trained(manifest, config, folder / "parts", resume=True)
    whole, parts = tensors(folder / "whole"), tensors(folder / "parts")
    assert whole.keys() == parts.keys()
    assert all(value.equal(parts[name]) for name, value in whole.items())
    return whole


@pytest.fixture(scope="module")
def first_run(manifest, small_settings, tmp_path_factory):
    """Return the folder of a run with centres; tests only read it."""
    folder = tmp_path_factory.mktemp("first") / "run"
    losses = small_settings.losses.model_copy(update={"centring": "softmax"})
    train(manifest, small_settings.model_copy(update={"losses": losses}), folder, resume=False, device="cpu")
    return folder


def begun(config):
    student, teacher = student_and_teacher(config)
    centrings = Centrings(config, torch.device("cpu"))
    phases.begin(config, student, teacher, centrings)
    return student, teacher, centrings


def test_a_high_resolution_phase_begins_with_all_of_a_run_on_a_finer_grid(first_run, settings):
    config = settings(crops__global_px=48, start={"run": str(first_run)}, losses={"centring": "softmax"})
    student, teacher, centrings = begun(config)
    before = tensors(first_run)

    for kind, network in (("student", student), ("teacher", teacher)):
        for name, value in network.state_dict().items():
            stored = before[f"{kind}/{name}"]
            wanted = published.resized(stored, 6) if name == "backbone.pos_embed" else stored
            assert value.equal(wanted), name
    assert student.backbone.pos_embed.shape == (1, 37, 24)
    assert centrings.dino.value_K.equal(before["centre/dino"])
    assert before["centre/dino"].abs().max() > 0


def test_a_high_resolution_phase_is_resumed_without_the_run_it_began_with(manifest, first_run, settings, tmp_path):
    shutil.copytree(first_run, tmp_path / "first")
    config = settings(crops__global_px=48, start={"run": str(tmp_path / "first")}, **SHORT)

    assert_resumed_to_the_bit(manifest, config, tmp_path, lambda: shutil.rmtree(tmp_path / "first"))


def test_a_run_of_another_shape_is_no_start(manifest, first_run, settings, tmp_path):
    config = settings(model__dim=32, start={"run": str(first_run)})

    with pytest.raises(
        TrainError, match=r"another model or other heads \(model\.dim: 24 → 32\); set those of that run"
    ):
        trained(manifest, config, tmp_path)
    with pytest.raises(TrainError, match=r"nowhere: holds no checkpoint; name the --output folder"):
        trained(manifest, settings(start={"run": "nowhere"}), tmp_path / "other")


@pytest.fixture(scope="module")
def backbone(small_settings):
    """Return a backbone whose every weight matters; ImageNet's grid is not its own."""
    torch.manual_seed(1)
    network = VisionTransformer(small_settings.model, 64).requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    network.mask_token.zero_()  # timm has none
    return network


def written(backbone, config, folder, kind):
    """Write a backbone as others do; return the path."""
    state = backbone.state_dict()
    if kind in ("timm", "transformers"):
        export.FORMATS[kind](backbone, config, 0, folder)
        return folder
    folder.mkdir(exist_ok=True)
    if kind == "published":
        torch.save(state, folder / "dinov2.pth")
        return folder / "dinov2.pth"
    wrapped = {"teacher": {f"backbone.{name}": value for name, value in state.items()}}
    torch.save(wrapped | {"iteration": 5}, folder / "teacher_checkpoint.pth")
    return folder / "teacher_checkpoint.pth"


@pytest.mark.parametrize("kind", ["timm", "transformers", "published", "training_script"])
def test_a_published_backbone_is_where_both_networks_begin(backbone, settings, small_settings, tmp_path, kind):
    path = written(backbone, small_settings, tmp_path / kind, kind)
    student, teacher, _ = begun(settings(start={"backbone": str(path)}))
    random, _ = student_and_teacher(settings())

    for network in (student, teacher):
        for name, value in network.backbone.state_dict().items():
            wanted = backbone.state_dict()[name]
            wanted = published.resized(wanted, 4) if name == "pos_embed" else wanted
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6, msg=name)
        assert network.dino_head.last_layer.weight_v.equal(random.dino_head.last_layer.weight_v)


def test_filters_of_colours_are_shared_out_over_other_channels(backbone, small_settings, tmp_path):
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = backbone([x.expand(-1, 3, -1, -1)])[0].cls_ND
    for channels in (1, 2, 3, 5):
        model = small_settings.model.model_copy(update={"channels": channels})
        other = VisionTransformer(model, 64)
        published.load_weights(other, tmp_path / "model.safetensors")
        torch.testing.assert_close(other([x.expand(-1, channels, -1, -1)])[0].cls_ND, wanted)


def test_a_network_without_layer_scale_has_one_of_one(backbone, small_settings, tmp_path):
    state = {name: value for name, value in names.to_timm(backbone.state_dict()).items() if "gamma" not in name}
    save_file(state, tmp_path / "model.safetensors")
    other = VisionTransformer(small_settings.model, 64)
    published.load_weights(other, tmp_path / "model.safetensors")

    assert other.blocks[1].ls2.gamma.eq(1).all()


def test_another_backbone_is_refused_with_its_shape(backbone, settings, tmp_path):
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    config = settings(model__dim=32, start={"backbone": str(tmp_path / "model.safetensors")})

    with pytest.raises(TrainError, match=r"\(dim: 24, depth: 2, patch_px: 8, ffn: mlp, registers: 0\)"):
        begun(config)
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(TrainError, match=r"text.pth: cannot be read as tensors"):
        begun(settings(start={"backbone": str(tmp_path / "text.pth")}))


def test_heads_are_warmed_up_while_the_backbone_stands_still(manifest, backbone, settings, tmp_path):
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    start = {"backbone": str(tmp_path / "model.safetensors"), "head_warmup_steps": 2}
    config = settings(start=start, schedule__steps=4, schedule__warmup_steps=2, schedule__freeze_last_layer_steps=0)
    first, _, _ = begun(config)
    trained(manifest, config, tmp_path / "run", should_stop=stop_after(2))
    warm = tensors(tmp_path / "run")
    trained(manifest, config, tmp_path / "run", resume=True)
    last = tensors(tmp_path / "run")

    for name, value in first.state_dict().items():
        if name.startswith("backbone."):
            assert warm[f"student/{name}"].equal(value), name
            torch.testing.assert_close(warm[f"teacher/{name}"], value)
        elif name.endswith("weight_v"):
            assert not warm[f"student/{name}"].equal(value)
    assert not last["student/backbone.cls_token"].equal(first.backbone.cls_token)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert ["grad_norm_backbone" in line for line in log] == [False, False, True, True]
    assert [last[f"step/{name}"].item() for name in ("backbone.cls_token", "dino_head.mlp.0.bias")] == [2, 4]
    assert [Schedules(config).at(step).backbone_lr_mult for step in range(4)] == [0, 0, 0.5, 1]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_warm_up_of_heads_resumes_to_the_bit(manifest, backbone, settings, tmp_path, stop):
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    start = {"backbone": str(tmp_path / "model.safetensors"), "head_warmup_steps": 2}

    assert_resumed_to_the_bit(manifest, settings(start=start, **SHORT), tmp_path, stop=stop)


def test_heads_that_learn_alone_have_the_gradients_they_have_with_the_backbone(settings):
    config = settings()
    student, teacher = student_and_teacher(config)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(4, 3, side, side, generator=generator) for side in (32, 16)]
    inputs = Inputs.of(views, torch.rand(4, 16, generator=generator) < 0.3)
    (targets,), _ = teacher_targets(teacher, [inputs], 0.07, config.losses, Centrings(config, torch.device("cpu")))
    gradients = {}
    for student.heads_alone in (False, True):
        student.zero_grad()
        objective(inputs.ask(student, config.losses, None), inputs, targets, config.losses).total.backward()
        gradients[student.heads_alone] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    heads = {name for name in gradients[False] if not name.startswith("backbone.")}
    assert gradients[True].keys() == heads < gradients[False].keys()
    assert all(gradients[True][name].equal(gradients[False][name]) for name in heads)


@pytest.mark.parametrize("centring", ["sinkhorn_knopp", "softmax"])
def test_a_distilled_student_learns_from_a_teacher_that_stands_still(manifest, first_run, settings, tmp_path, centring):
    config = settings(
        distillation={"teacher": str(first_run)},
        model={"dim": 16, "depth": 1, "heads": 2, "patch_px": 8, "layer_scale": 1.0},
        losses={"masked_share": 0, "centring": centring},
        **SHORT,
    )
    end = assert_resumed_to_the_bit(manifest, config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]

    assert end["teacher/backbone.cls_token"].shape == end["student/backbone.cls_token"].shape == (1, 1, 16)
    assert not end["teacher/backbone.cls_token"].equal(end["student/backbone.cls_token"])  # its running mean
    assert {"loss_ibot", "loss_dino_local", "loss_dino_global"} <= lines[0].keys()
    assert export.read_backbone(tmp_path / "whole")[0].config.shape.dim == 16


def test_distillation_compares_every_patch_of_both_global_crops(first_run, manifest, settings):
    config = settings(distillation={"teacher": str(first_run)}, **WHOLE)
    guide = phases.guide(config)
    views = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    inputs = Inputs.of(views, torch.zeros(4, 16, dtype=torch.bool), every_patch=True)
    centrings = Centrings(config, torch.device("cpu"))
    (targets,), _ = teacher_targets(guide, [inputs], 0.07, config.losses, centrings)
    answers = inputs.ask(guide, config.losses, None)

    assert len(targets.ibot) == len(answers.patches.unit_ND) == 4 * 16
    assert inputs.weight_M.sum().item() == pytest.approx(4)
    assert not any(parameter.requires_grad for parameter in guide.parameters())


def test_a_teacher_that_cannot_teach_is_refused_with_what_to_set(first_run, settings):
    config = settings(
        distillation={"teacher": str(first_run)},
        model={"dim": 24, "depth": 2, "heads": 2, "patch_px": 16},
        heads__ibot={"prototypes": 23},
        losses=WHOLE["losses"],
    )

    with pytest.raises(TrainError, match=r"set model\.patch_px to 8.*set heads\.ibot\.prototypes to 24"):
        phases.guide(config)


@pytest.mark.parametrize("damage", [Path.unlink, lambda tensors: os.truncate(tensors, 1000)])
def test_another_teacher_is_not_resumed_with(manifest, first_run, settings, tmp_path, damage):
    shutil.copytree(first_run, tmp_path / "teacher")
    config = settings(distillation={"teacher": str(tmp_path / "teacher")}, **WHOLE, **SHORT)
    trained(manifest, config, tmp_path / "run", should_stop=stop_after(2))
    damage(tmp_path / "teacher/checkpoints/step_00000008.safetensors")

    with pytest.raises(TrainError, match=r"was started with another distillation\.teacher"):
        trained(manifest, config, tmp_path / "run", resume=True)
