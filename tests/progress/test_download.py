"""What a download says, for programs."""

import io
import json

from curation.progress.download import DownloadLines


def test_lines_come_at_the_start_every_five_seconds_and_at_the_end():
    stream, now = io.StringIO(), [0.0]
    with DownloadLines(stream, lambda: now[0]) as lines:
        for second in range(11):
            now[0] = float(second)
            lines("m", 100 * second, 1000)

    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["bytes"] for line in told] == [0, 500, 1000]
    assert told[1] == {
        "event": "download",
        "name": "m",
        "bytes": 500,
        "of": 1000,
        "bytes_per_s": 100,
        "eta_s": 5.0,
    }
