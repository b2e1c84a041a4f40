"""What training says: a bar with figures for people, JSON lines for programs."""

import io
import json
import re

from curation.dinov2.log import StepReport
from curation.progress.train import TrainBar, TrainLines, train_reporter


def report(step, warnings=(), **figures):
    figures = {"loss": 5.25, "loss_ibot": 2.5, "images_per_s": 12.34, "peak_memory_gb": 1.5, **figures}
    return StepReport(step, 20, False, figures, warnings)


def test_a_terminal_gets_a_bar_and_anything_else_lines(terminal):
    assert isinstance(train_reporter(terminal), TrainBar)
    assert isinstance(train_reporter(io.StringIO()), TrainLines)


def test_lines_are_few_and_tell_the_time_left_from_the_steps_of_this_process():
    now = [100.0]
    stream = io.StringIO()
    with train_reporter(stream, lambda: now[0]) as show:
        for step in range(11, 21):  # a run that goes on after step 10
            show(report(step, rank=float("nan")))
            now[0] += 2.0

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["step"], line["eta_s"]) for line in lines] == [(11, None), (14, 12.0), (17, 6.0), (20, 0.0)]
    assert (lines[1]["loss"], lines[1]["images_per_s"], lines[1]["of"], lines[1]["event"]) == (5.25, 12.34, 20, "train")
    assert "rank" not in lines[1]


def test_every_warning_is_a_line_at_once():
    stream = io.StringIO()
    with train_reporter(stream, lambda: 0.0) as show:
        for step in range(1, 4):
            show(report(step, ("features collapse",) if step == 2 else ()))

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["train", "warning"]
    assert lines[1]["message"] == "features collapse"


def test_a_bar_shows_rate_memory_and_losses_and_above_it_warnings_and_knn(terminal):
    with TrainBar(terminal) as show:
        show(report(1, knn_top1=0.375, knn_top1_random=0.25, knn_top1_pixels=0.3125))
        show(report(20, ("step 20: features [collapse]",)))

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "step 20: features [collapse]" in text
    assert "step 1: k-NN 37.5 %, random weights 25.0 %, raw pixels 31.2 %" in text
    last = " ".join(text.splitlines()[-3:])
    for part in (
        "20/20",
        "12.3 images/s",
        "1.5 GB",
        "loss 5.250",
        "ibot 2.500",
    ):
        assert part in last, part
