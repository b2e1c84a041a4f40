"""Steps whose loss or gradient is not finite."""

import hashlib
import json
import math

import pytest
from safetensors.torch import load_file, save_file

from curation.dinov2.log import read
from curation.dinov2.objective import Inputs
from curation.dinov2.train import train
from curation.errors import TrainError


@pytest.fixture
def nan_at(monkeypatch):
    """Return a function that lets the given steps, counted over all runs from 1, see a pixel that is no number."""

    def make(*steps):
        calls = []

        def with_nan(views, *arguments, **options):
            calls.append(1)
            if len(calls) in steps:
                views[0][0, 0, 0, 0] = math.nan
            return inputs_of(views, *arguments, **options)

        inputs_of = Inputs.of
        monkeypatch.setattr(Inputs, "of", with_nan)

    return make


def after(steps):
    """Return what stops a run after so many steps."""
    return iter([False] * (steps - 1) + [True]).__next__


def test_losses_that_stay_non_finite_stop_the_run_with_the_reason(manifest, settings, tmp_path):
    first = train(manifest, settings(), tmp_path, resume=False, device="cpu", should_stop=after(1))
    tensors = load_file(first.checkpoint)
    tensors["student/backbone.norm.weight"].fill_(math.nan)
    marker = first.checkpoint.with_suffix(".json")
    content = json.loads(marker.read_text())
    save_file(tensors, first.checkpoint)
    content["sha256"] = hashlib.sha256(first.checkpoint.read_bytes()).hexdigest()
    marker.write_text(json.dumps(content))

    config = settings(optim__max_nonfinite_steps=3)
    with pytest.raises(TrainError, match=r"the last 3 steps up to step 4 were not finite \(.*loss_ibot"):
        train(manifest, config, tmp_path, resume=True, device="cpu")
    last = list(read(tmp_path / "log.jsonl"))[-1]
    assert (last["skipped"], last["loss"], last["skipped_steps"]) == (True, None, 3)


def test_a_run_whose_last_steps_are_skipped_says_where_its_weights_are_from(
    manifest, settings, tmp_path, nan_at, caplog
):
    nan_at(7, 8)
    stopped = train(manifest, settings(), tmp_path, resume=False, device="cpu", should_stop=after(6))
    before = load_file(stopped.checkpoint)
    result = train(manifest, settings(), tmp_path, resume=True, device="cpu")

    assert "the run ends with the weights of step 6" in caplog.text
    assert all(value.equal(before[name]) for name, value in load_file(result.checkpoint).items())


def test_a_step_that_sees_nan_is_skipped_and_changes_nothing(manifest, settings, tmp_path, nan_at):
    nan_at(3)
    config = settings(losses={"centring": "softmax"}, checkpoint={"every_steps": 1, "keep": 8})
    train(manifest, config, tmp_path, resume=False, device="cpu", should_stop=after(3))
    result = train(manifest, config, tmp_path, resume=True, device="cpu")
    before, skipped = (load_file(tmp_path / f"checkpoints/step_{step:08d}.safetensors") for step in (2, 3))
    log = list(read(tmp_path / "log.jsonl"))

    assert [line["skipped"] for line in log] == [step == 2 for step in range(8)]
    assert log[-1]["skipped_steps"] == 1
    assert all(value.equal(skipped[name]) for name, value in before.items())
    assert all(value.isfinite().all() for value in load_file(result.checkpoint).values())


def test_skipped_steps_push_no_checkpoint_out(manifest, settings, tmp_path, nan_at):
    nan_at(3, 5, 6, 7)
    config = settings(checkpoint={"every_steps": 3, "keep": 2}, optim__max_nonfinite_steps=3)
    with pytest.raises(TrainError, match=r"where these are ruined already, delete it, and the one before is taken"):
        train(manifest, config, tmp_path, resume=False, device="cpu")

    # The third step was skipped, so the fourth is saved in its place; the sixth lies among skipped ones.
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.safetensors")] == ["step_00000004"]
