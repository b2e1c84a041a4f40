"""How many of a known number are done: a bar for people, JSON lines for programs."""

import io
import json

from curation.progress.counter import counter


def test_a_counter_says_at_times_how_many_are_done_and_how_long_the_rest_takes():
    now, stream = [0.0], io.StringIO()
    with counter(stream, "images", lambda: now[0]) as count:
        for done_images in range(1, 41):
            now[0] += 1.0
            count(done_images, 40)

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["images"], line["eta_s"]) for line in lines] == [(10, 30.0), (20, 20.0), (30, 10.0), (40, 0.0)]


def test_a_counter_draws_a_bar_on_a_terminal(terminal):
    with counter(terminal, "images") as count:
        count(7, 7)

    assert "7/7" in terminal.getvalue()
