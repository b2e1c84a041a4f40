"""How many of a known number are done."""

import time
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from curation.progress.display import Bar, Clock, Lines, Pace


def counter(stream: IO[str], what: str, clock: Clock = time.monotonic) -> "CounterBar | CounterLines":
    """Return what is told how many are done, and of how many: a bar if the stream is a terminal, else JSON lines."""
    return CounterBar(stream, what) if stream.isatty() else CounterLines(stream, what, clock)


class CounterLines(Lines):
    """A line every ten seconds, and when all are done."""

    every_s = 10.0

    def __init__(self, stream: IO[str], what: str, clock: Clock = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._what, self._pace = what, Pace(clock=clock)

    def __call__(self, done: int, total: int) -> None:
        """Say so, if it is time."""
        if done == total or self.is_due():
            self.tell(**{"event": "progress", self._what: done, "of": total, "eta_s": self._pace.left_s(done, total)})


class CounterBar(Bar):
    """A bar with the time left."""

    def __init__(self, stream: IO[str], what: str) -> None:
        super().__init__(stream, TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._task = self._progress.add_task(what, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show it."""
        self._progress.update(self._task, completed=done, total=total)
