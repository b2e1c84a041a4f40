import subprocess
import sys
from pathlib import Path

import pytest

from curation.dinov2.config import TrainConfig
from curation.errors import ConfigError
from curation.settings import load, parse

CONFIGS = Path(__file__).parents[2] / "configs" / "dinov2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("crops.global_px=60", "crops.global_px 60 must be a multiple of model.patch_px 14"),
        ("model.dim=100", "dim 100 must be a multiple of heads 6"),
        ("schedule.warmup_steps=200000", "warmup_steps 200000 is more than steps 125000"),
        ("losses.mask_ratio=[0.5,0.1]", "mask_ratio must rise"),
        ("data.batch_size=1", "must be at least 2"),
        ("losses.masked_share=0", "ibot_weight needs masks"),
        ("losses={ibot_weight: 0, masked_share: 0}", "heads.ibot learns nothing"),
        ("nosuch.key=1", "unknown key"),
        ("model.channels=4", "images are RGB, of which training makes 3 channels, or 1"),
        ("model.channels=1", "a number for each of model.channels 1"),
        ("start={run: a, backbone: b}", "give either run or backbone"),
        ("start={backbone: b, head_warmup_steps: 200000}", "head_warmup_steps 200000 is more than schedule.steps"),
        ("distillation={teacher: a}", "set losses.masked_share and model.drop_path to 0"),
        ("preset=mae", "preset"),
    ],
)
def test_a_mistake_is_refused_with_its_reason(tmp_path, change, message):
    (tmp_path / "empty.yaml").write_text("heads: {ibot: {}}\n")

    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, tmp_path / "empty.yaml", [change])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_settings_file_that_ships_is_valid(path):
    config = load(TrainConfig, path)

    assert config.crops.local_px % config.model.patch_px == 0
    assert (config.losses.ibot_weight == 0) == (path.stem == "dino")
    assert parse(TrainConfig, config.model_dump(mode="json"), "again") == config


def test_a_preset_sets_what_is_left_out(tmp_path):
    (tmp_path / "my.yaml").write_text("preset: ibot\noptim: {base_lr: 0.001}\n")
    config = load(TrainConfig, tmp_path / "my.yaml")

    assert (config.losses.centring, config.losses.koleo_weight, config.losses.ibot_weight) == ("softmax", 0, 1)
    assert (config.heads.dino.prototypes, config.heads.dino.bottleneck_dim, config.heads.ibot) == (8192, 256, None)
    assert (config.optim.base_lr, config.optim.layer_decay) == (0.001, 1.0)
    dino = load(TrainConfig, tmp_path / "my.yaml", ["preset=dino"])
    assert (dino.losses.ibot_weight, dino.losses.masked_share, dino.schedule.momentum) == (0, 0, (0.996, 1.0))
    again = load(TrainConfig, tmp_path / "my.yaml", ["preset=dino", "losses.koleo_weight=0.2"])
    assert again.losses == dino.losses.model_copy(update={"koleo_weight": 0.2})


def test_settings_need_no_pytorch():
    program = "import sys, curation.dinov2, curation.dinov2.config; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0
