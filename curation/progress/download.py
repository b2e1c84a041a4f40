"""What a download says: a bar with its rate and the time left on a terminal, JSON lines elsewhere."""

import time
from typing import IO

from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from curation.progress.display import Bar, Clock, Lines, Pace


def download_reporter(stream: IO[str]) -> "DownloadBar | DownloadLines":
    """Return what is told of a download's bytes: a bar if the stream is a terminal, else JSON lines."""
    return DownloadBar(stream) if stream.isatty() else DownloadLines(stream)


class DownloadLines(Lines):
    """A line when a file begins, every five seconds, and when it is complete."""

    def __init__(self, stream: IO[str], clock: Clock = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._name: str | None = None
        self._pace = Pace(clock=clock)

    def __call__(self, name: str, done_bytes: int, total_bytes: int | None) -> None:
        """Count the bytes of a file that are here, of all where their number is known; write a line when it is time."""
        begins = name != self._name
        if begins:
            self._name, self._pace = name, Pace(done_bytes, self._clock)
        if begins or done_bytes == total_bytes or self.is_due():
            self.tell(
                event="download",
                name=name,
                bytes=done_bytes,
                of=total_bytes,
                bytes_per_s=round(self._pace.per_s(done_bytes)),
                eta_s=None if total_bytes is None else self._pace.left_s(done_bytes, total_bytes),
            )


class DownloadBar(Bar):
    """A bar a file, with its rate and the time left."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(
            stream,
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, done_bytes: int, total_bytes: int | None) -> None:
        """Show the bytes."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total_bytes)
        self._progress.update(self._tasks[name], completed=done_bytes, total=total_bytes)
