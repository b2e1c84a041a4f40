"""Where progress is shown, and how fast it goes."""

import json
import time
from collections.abc import Callable
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

Clock = Callable[[], float]  # seconds


class Pace:
    """How fast something of known size goes, from now on: what was done before says nothing of it.

    Args:
        done: How much of it is done already.
        clock: Seconds.
    """

    def __init__(self, done: float = 0, clock: Clock = time.monotonic) -> None:
        self._before, self._clock = done, clock
        self._started = clock()

    def per_s(self, done: float) -> float:
        """Return how much was done a second until ``done`` is."""
        return (done - self._before) / max(1e-6, self._clock() - self._started)

    def left_s(self, done: float, total: float) -> float | None:
        """Return the seconds until all is done at this pace; None before anything was."""
        rate = self.per_s(done)
        return round(max(0.0, total - done) / rate, 1) if rate > 0 else None


class Lines:
    """One JSON object a line. A context that ends with all of them written."""

    every_s = 5.0  # between lines that say how far something is

    def __init__(self, stream: IO[str], clock: Clock = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._told = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.flush()

    def write(self, **line: Any) -> None:
        """Write a line."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def tell(self, **line: Any) -> None:
        """Write a line that says how far something is."""
        self._told = self._clock()
        self.write(**line)

    def is_due(self) -> bool:
        """Whether the last of these lines is some time ago."""
        return self._clock() - self._told >= self.every_s


class Bar:
    """Live bars of the given columns, and lines above them. A context that ends the display."""

    def __init__(self, stream: IO[str], *columns: ProgressColumn) -> None:
        self._console = Console(file=stream)
        self._progress = Progress(*columns, console=self._console)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def print(self, message: str, *, style: str | None = None) -> None:
        """Write a line above the bars."""
        self._console.print(message, style=style, markup=False)
