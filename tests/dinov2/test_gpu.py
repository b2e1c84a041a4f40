"""What runs on a GPU gives what it gives on a CPU."""

import numpy as np
import pytest
import torch

from curation.dinov2 import colour
from curation.dinov2.config import CropsConfig
from curation.dinov2.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_colours_on_a_gpu_are_those_on_a_cpu():
    config = CropsConfig()
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 3, 96, 96), dtype=np.uint8))
    steps = colour.plan(colour.draw(0, 3, 24), config, 0.5, 0.5)

    on_gpu = colour.augment(views.cuda(), steps, config).cpu()

    torch.testing.assert_close(on_gpu, colour.augment(views, steps, config), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_run_on_a_gpu_has_the_losses_of_one_on_a_cpu(manifest, settings, tmp_path, precision, tolerance):
    config = settings(schedule__steps=3)
    on_cpu = train(manifest, config, tmp_path / "cpu", resume=False, device="cpu")
    changed = config.model_copy(update={"precision": precision})
    on_gpu = train(manifest, changed, tmp_path / "gpu", resume=False, device="cuda")

    assert on_gpu.losses["loss"] == pytest.approx(on_cpu.losses["loss"], rel=tolerance)
