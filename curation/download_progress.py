"""What a download says while it works: a bar on a terminal, JSON lines elsewhere."""

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY_S = 5.0


class DownloadReporter(Protocol):
    """Is told of a download's bytes; a context that ends the display."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, name: str, done_bytes: int, total_bytes: int | None) -> None:
        """Take the bytes of a file that are here, of all where their number is known."""


def download_reporter(stream: IO[str]) -> DownloadReporter:
    """Return a bar if the stream is a terminal, else JSON lines."""
    return _Bar(stream) if stream.isatty() else DownloadLines(stream)


class DownloadLines:
    """One JSON object a line: when a file begins, every five seconds, and when it is complete."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._name: str | None = None
        self._started = self._said = 0.0
        self._first_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, name: str, done_bytes: int, total_bytes: int | None) -> None:
        """Count bytes; write a line when it is time."""
        now = self._clock()
        begins = name != self._name
        if begins:
            self._name, self._started, self._first_bytes = name, now, done_bytes
        if not begins and done_bytes != total_bytes and now - self._said < _LINE_EVERY_S:
            return
        self._said = now
        rate = (done_bytes - self._first_bytes) / (now - self._started) if now > self._started else 0.0
        left = (total_bytes - done_bytes) / rate if total_bytes is not None and rate else None
        line: dict[str, Any] = {"event": "download", "name": name, "bytes": done_bytes, "of": total_bytes}
        line |= {"bytes_per_s": round(rate), "eta_s": None if left is None else round(left, 1)}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


class _Bar:
    """A bar a file, with its rate and the time left."""

    def __init__(self, stream: IO[str]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, name: str, done_bytes: int, total_bytes: int | None) -> None:
        """Show the bytes."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total_bytes)
        self._progress.update(self._tasks[name], completed=done_bytes, total=total_bytes)
