"""What a run says while it works: bars for people, JSON lines for programs."""

import io
import json
import re
import threading

import pytest

from curation import progress
from curation.config import RunConfig
from curation.pipelines.driver import RowsDone, StepEnded, StepStarted, Warned
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.units import Done, Unit
from curation.progress import Bars, Counter, JsonLines, _Rates, reporter

STEP = build_plan(RunConfig()).step("nsfw")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


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


def test_a_terminal_gets_bars_and_anything_else_lines():
    assert isinstance(reporter(Terminal()), Bars)
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


def test_a_unit_at_work_is_heard_of_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    stream = io.StringIO()
    report = JsonLines(stream)
    report(StepStarted(STEP, 1, 100, 0))
    report(RowsDone(10))

    last = json.loads(stream.getvalue().splitlines()[-1])

    assert (last["event"], last["step"], last["rows"], last["units"]) == ("progress", "nsfw", 10, 0)


def test_rate_and_time_left_follow_the_clock():
    now = [100.0]
    rates = _Rates(lambda: now[0])
    rates.start(4, 1000)
    now[0] = 110.0

    line = rates.tick(250)
    assert (line["rows_per_s"], line["eta_s"]) == (25.0, 30.0)

    now[0] = 120.0
    line = rates.add(500)
    assert (line["rows"], line["rows_per_s"], line["eta_s"]) == (500, 25.0, 20.0)


def test_a_step_of_unknown_size_has_no_time_left():
    rates = _Rates()
    rates.start(0, 0)

    assert rates.tick(5)["eta_s"] is None


def test_rows_counted_from_many_threads_are_all_counted():
    rates = _Rates()
    rates.start(1, 8000)
    threads = [threading.Thread(target=lambda: [rates.tick(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert rates.tick(0)["rows"] == 8000


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_bars_show_the_step_its_units_a_rate_and_the_time_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with reporter(stream) as report:
        for event in list(events())[:-3]:
            report(event)
        report._progress.refresh()

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())

    assert "nsfw" in text
    assert "1/2" in text
    assert re.search(r"[\d,]+ rows/s", text)
    assert re.search(r"\d:\d\d:\d\d", text)
    assert "mind [bold]this[/bold]" in text


def test_a_finished_bar_is_full(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    bars = Bars(Terminal())
    with bars:
        for event in events():
            bars(event)
        (task,) = bars._progress.tasks

        assert task.finished
        assert task.fields["units"] == "2/2"


def test_a_bar_of_a_step_without_rows_does_not_fail():
    bars = Bars(Terminal())
    with bars:
        for event in (StepStarted(STEP, 1, 0, 0), done(0, 0), StepEnded(STEP, False, 0.1)):
            bars(event)


def test_a_counter_says_at_times_how_many_are_done_and_how_long_the_rest_takes():
    now, stream = [0.0], io.StringIO()
    with Counter(stream, "images", lambda: now[0]) as counter:
        for done_images in range(1, 41):
            now[0] += 1.0
            counter(done_images, 40)

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["images"], line["eta_s"]) for line in lines] == [(10, 30.0), (20, 20.0), (30, 10.0), (40, 0.0)]


def test_a_counter_draws_a_bar_on_a_terminal():
    stream = Terminal()
    with Counter(stream, "images") as counter:
        counter(7, 7)

    assert "7/7" in stream.getvalue()
