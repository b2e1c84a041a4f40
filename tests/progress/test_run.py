"""What a run says while it works: bars for people, JSON lines for programs."""

import io
import json
import re
import threading

import pytest

from curation.config import RunConfig
from curation.pipelines.driver import RowsDone, StepEnded, StepStarted, Warned
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.units import Done, Unit
from curation.progress.run import Bars, JsonLines, _StepAtWork, reporter

STEP = build_plan(RunConfig()).step("nsfw")


def done(shard, num_rows=50):
    return Done(Unit("nsfw", "pool", shard, {}), num_rows, num_rows, 0.1)


def events():
    yield StepEnded(build_plan(RunConfig()).step("fetch"), True, 0.0)
    yield StepStarted(STEP, 2, 100, 3)
    yield RowsDone(20)
    yield RowsDone(30)
    yield done(0)
    yield Warned("mind [bold]this[/bold]")
    yield RowsDone(50)
    yield done(1)
    yield StepEnded(STEP, False, 1.5)


def test_a_terminal_gets_bars_and_anything_else_lines(terminal):
    assert isinstance(reporter(terminal), Bars)
    assert isinstance(reporter(io.StringIO()), JsonLines)


def test_every_line_is_a_json_object():
    stream = io.StringIO()
    with reporter(stream) as report:
        for event in events():
            report(event)

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]

    assert [line["event"] for line in lines] == ["end", "start", "done", "warning", "done", "end"]
    assert lines[1] == {"event": "start", "step": "nsfw", "units": 2, "rows": 100, "finished_before": 3}
    assert (lines[2]["shard"], lines[2]["computed"], lines[2]["units"], lines[2]["of"]) == (0, 50, 1, 2)
    assert lines[2]["rows_per_s"] > 0
    assert lines[2]["eta_s"] >= 0
    assert lines[4]["eta_s"] == 0
    assert (lines[0]["skipped"], lines[5]["skipped"]) == (True, False)


def test_a_unit_at_work_is_heard_of_every_ten_seconds():
    now, stream = [0.0], io.StringIO()
    report = JsonLines(stream, lambda: now[0])
    report(StepStarted(STEP, 1, 100, 0))
    for _ in range(25):
        now[0] += 1.0
        report(RowsDone(2))

    told = [json.loads(line) for line in stream.getvalue().splitlines()][1:]

    assert [(line["event"], line["step"], line["units"]) for line in told] == [("progress", "nsfw", 0)] * 2
    assert [(line["rows"], line["rows_per_s"], line["eta_s"]) for line in told] == [(20, 2.0, 40.0), (40, 2.0, 30.0)]


def test_rate_and_time_left_follow_the_clock():
    now = [100.0]
    step = _StepAtWork(4, 1000, lambda: now[0])
    now[0] = 110.0

    line = step.tick(250)
    assert (line["rows_per_s"], line["eta_s"]) == (25.0, 30.0)

    now[0] = 120.0
    line = step.add(500)
    assert (line["rows"], line["rows_per_s"], line["eta_s"]) == (500, 25.0, 20.0)


def test_a_step_of_unknown_size_has_no_time_left():
    assert _StepAtWork(0, 0).tick(5)["eta_s"] is None


def test_rows_counted_from_many_threads_are_all_counted():
    step = _StepAtWork(1, 8000)
    threads = [threading.Thread(target=lambda: [step.tick(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert step.tick(0)["rows"] == 8000


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_bars_show_the_step_its_units_a_rate_and_the_time_left(terminal):
    with reporter(terminal) as report:
        for event in list(events())[:-3]:
            report(event)
        report._progress.refresh()

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())

    assert "nsfw" in text
    assert "1/2" in text
    assert re.search(r"[\d,]+ rows/s", text)
    assert re.search(r"\d:\d\d:\d\d", text)
    assert "mind [bold]this[/bold]" in text


def test_a_finished_bar_is_full(terminal):
    bars = Bars(terminal)
    with bars:
        for event in events():
            bars(event)
        (task,) = bars._progress.tasks

        assert task.finished
        assert task.fields["units"] == "2/2"


def test_a_bar_of_a_step_without_rows_does_not_fail(terminal):
    bars = Bars(terminal)
    with bars:
        for event in (StepStarted(STEP, 1, 0, 0), done(0, 0), StepEnded(STEP, False, 0.1)):
            bars(event)
