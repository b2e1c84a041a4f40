"""What a run says while it works: bars on a terminal, JSON lines elsewhere."""

import threading
import time
from typing import IO, Any

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from curation.pipelines.driver import Event, Noted, RowsDone, StepEnded, StepStarted, Warned
from curation.progress.display import Bar, Clock, Lines, Pace


def reporter(stream: IO[str]) -> "Bars | JsonLines":
    """Return what is told of the events of a run: bars if the stream is a terminal, else JSON lines."""
    return Bars(stream) if stream.isatty() else JsonLines(stream)


class _StepAtWork:
    """Units and rows of a step that are done; rows of units at work are heard of before their unit is."""

    def __init__(self, num_units: int = 0, num_rows: int = 0, clock: Clock = time.monotonic) -> None:
        self.units, self.rows = num_units, num_rows
        self._pace = Pace(clock=clock)
        self._lock = threading.Lock()
        self._done_units = self._done_rows = self._ticked = 0

    def tick(self, num_rows: int) -> dict[str, Any]:
        """Count rows of units at work."""
        with self._lock:
            self._ticked += num_rows
            return self._line()

    def add(self, num_rows: int) -> dict[str, Any]:
        """Count a unit that is done."""
        with self._lock:
            self._done_units += 1
            self._done_rows += num_rows
            self._ticked = max(self._ticked, self._done_rows)
            return self._line()

    def _line(self) -> dict[str, Any]:
        shares = [done / of for done, of in ((self._ticked, self.rows), (self._done_units, self.units)) if of]
        return {
            "units": self._done_units,
            "of": self.units,
            "rows": self._ticked,
            "rows_per_s": round(self._pace.per_s(self._ticked), 1),
            "eta_s": self._pace.left_s(max(shares, default=0), 1),
        }


class JsonLines(Lines):
    """A line an event; while a unit is at work, one every ten seconds."""

    every_s = 10.0

    def __init__(self, stream: IO[str], clock: Clock = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._step, self._at_work = "", _StepAtWork()

    def __call__(self, event: Event) -> None:
        """Write the event."""
        if isinstance(event, RowsDone):
            line = self._at_work.tick(event.num_rows)
            if self.is_due():
                self.tell(event="progress", step=self._step, **line)
        elif isinstance(event, StepStarted):
            self._step = event.step.name
            self._at_work = _StepAtWork(event.num_units, event.num_rows, self._clock)
            counts = {"units": event.num_units, "rows": event.num_rows, "finished_before": event.num_finished}
            self.tell(event="start", step=event.step.name, **counts)
        elif isinstance(event, StepEnded):
            self.write(event="end", step=event.step.name, skipped=event.skipped, s=round(event.seconds, 3))
        elif isinstance(event, Warned):
            self.write(event="warning", message=event.message)
        elif isinstance(event, Noted):
            self.write(event="note", message=event.message)
        else:
            done = {"step": event.unit.step, "collection": event.unit.collection, "shard": event.unit.shard}
            self.write(event="done", **done, computed=event.num_computed, **self._at_work.add(event.num_rows))


class Bars(Bar):
    """A bar a step, with rows a second and the time left."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(
            stream,
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.fields[units]:>12}"),
            TextColumn("{task.fields[rate]:>14}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task: TaskID | None = None
        self._at_work = _StepAtWork()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        if isinstance(event, StepStarted):
            self._at_work = _StepAtWork(event.num_units, event.num_rows)
            self._task = self._progress.add_task(
                event.step.name, total=max(1, event.num_rows), units=f"0/{event.num_units}", rate=""
            )
        elif isinstance(event, Warned):
            self.print(event.message, style="yellow")
        elif isinstance(event, Noted):
            self.print(event.message)
        elif isinstance(event, StepEnded):
            if self._task is not None and not event.skipped:
                self._progress.update(self._task, completed=max(1, self._at_work.rows))
                self._progress.stop_task(self._task)
        elif self._task is not None:
            at_work, num_rows = self._at_work, event.num_rows
            line = at_work.tick(num_rows) if isinstance(event, RowsDone) else at_work.add(num_rows)
            self._progress.update(
                self._task,
                completed=min(line["rows"], max(1, at_work.rows)),
                units=f"{line['units']}/{line['of']}",
                rate=f"{line['rows_per_s']:,.0f} rows/s",
            )
