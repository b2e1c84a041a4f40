import subprocess
import sys
from pathlib import Path

import pytest

from curation.config import load
from curation.dinov2.config import TrainConfig
from curation.errors import ConfigError

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


def test_settings_need_no_pytorch():
    program = "import sys, curation.dinov2, curation.dinov2.config; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0
