"""What a run says while it works: bars on a terminal, JSON lines elsewhere."""

import json
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from curation.pipelines.driver import Event, Noted, RowsDone, StepEnded, StepStarted, Warned


class Reporter(Protocol):
    """Takes the events of a run."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, event: Event) -> None:
        """Show the event."""


def reporter(stream: IO[str]) -> Reporter:
    """Return bars if the stream is a terminal, else JSON lines."""
    return Bars(stream) if stream.isatty() else JsonLines(stream)


_LINE_EVERY_S = 10.0


class _Rates:
    """Rows a second and seconds left of the step at work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.start(0, 0)

    def start(self, num_units: int, num_rows: int) -> None:
        """Begin to count a step."""
        self.started = self.said = self._clock()
        self.units, self.rows = num_units, num_rows
        self.done_units = self.done_rows = self.ticked = 0

    def tick(self, num_rows: int) -> dict[str, Any]:
        """Count rows of units at work."""
        with self._lock:
            self.ticked += num_rows
            return self._line()

    def add(self, num_rows: int) -> dict[str, Any]:
        """Count a unit that is done."""
        with self._lock:
            self.done_units += 1
            self.done_rows += num_rows
            self.ticked = max(self.ticked, self.done_rows)
            return self._line()

    def is_time(self) -> bool:
        """Whether the last line is some time ago."""
        now = self._clock()
        if now - self.said < _LINE_EVERY_S:
            return False
        self.said = now
        return True

    def _line(self) -> dict[str, Any]:
        seconds = max(1e-6, self._clock() - self.started)
        done = max(self.ticked / self.rows if self.rows else 0, self.done_units / self.units if self.units else 0)
        return {
            "units": self.done_units,
            "of": self.units,
            "rows": max(self.ticked, self.done_rows),
            "rows_per_s": round(max(self.ticked, self.done_rows) / seconds, 1),
            "eta_s": round(seconds * (1 - min(1.0, done)) / done, 1) if done else None,
        }


class JsonLines:
    """One JSON object a line and an event; while a unit is at work, one every ten seconds."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._rates = _Rates()
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        """Write the event."""
        if isinstance(event, RowsDone):
            line = self._rates.tick(event.num_rows)
            if self._rates.is_time():
                self._write({"event": "progress", "step": self._step, **line})
        elif isinstance(event, StepStarted):
            self._step = event.step.name
            self._rates.start(event.num_units, event.num_rows)
            self._write(
                {
                    "event": "start",
                    "step": event.step.name,
                    "units": event.num_units,
                    "rows": event.num_rows,
                    "finished_before": event.num_finished,
                }
            )
        elif isinstance(event, StepEnded):
            self._write(
                {"event": "end", "step": event.step.name, "skipped": event.skipped, "s": round(event.seconds, 3)}
            )
        elif isinstance(event, Warned):
            self._write({"event": "warning", "message": event.message})
        elif isinstance(event, Noted):
            self._write({"event": "note", "message": event.message})
        else:
            unit = event.unit
            done = {"event": "done", "step": unit.step, "collection": unit.collection, "shard": unit.shard}
            self._write({**done, "computed": event.num_computed, **self._rates.add(event.num_rows)})

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


class Bars:
    """A bar a step, with rows a second and the time left."""

    def __init__(self, stream: IO[str]) -> None:
        self._console = Console(file=stream)
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.fields[units]:>12}"),
            TextColumn("{task.fields[rate]:>14}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._rates = _Rates()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        if isinstance(event, StepStarted):
            self._rates.start(event.num_units, event.num_rows)
            self._task = self._progress.add_task(
                event.step.name, total=max(1, event.num_rows), units=f"0/{event.num_units}", rate=""
            )
        elif isinstance(event, Warned):
            self._console.print(event.message, style="yellow", markup=False)
        elif isinstance(event, Noted):
            self._console.print(event.message, markup=False)
        elif isinstance(event, StepEnded):
            if self._task is not None and not event.skipped:
                self._progress.update(self._task, completed=max(1, self._rates.rows))
                self._progress.stop_task(self._task)
        elif self._task is not None:
            line = self._rates.tick(event.num_rows) if isinstance(event, RowsDone) else self._rates.add(event.num_rows)
            self._progress.update(
                self._task,
                completed=min(line["rows"], max(1, self._rates.rows)),
                units=f"{line['units']}/{line['of']}",
                rate=f"{line['rows_per_s']:,.0f} rows/s",
            )


class Counter:
    """Says how many of a known number are done: a bar on a terminal, else a JSON line every ten seconds."""

    def __init__(self, stream: IO[str], what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._what, self._clock = stream, what, clock
        self._started = self._said = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._stream.isatty():
            columns = (TextColumn(self._what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Say so, if it is time."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = self._clock()
        if now - self._said >= _LINE_EVERY_S or done == total:
            self._said = now
            left = (now - self._started) * (total - done) / max(1, done)
            line = {"event": "progress", self._what: done, "of": total, "eta_s": round(left, 1)}
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
