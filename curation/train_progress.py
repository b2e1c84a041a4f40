"""What training says while it works: a bar with its figures on a terminal, JSON lines elsewhere."""

import json
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 5.0
_SHOWN = {
    "loss": "loss",
    "loss_dino_local": "local",
    "loss_dino_global": "global",
    "loss_ibot": "ibot",
    "loss_koleo": "koleo",
}


class Report(Protocol):
    """A finished step, as ``curation.dinov2.log.StepReport``."""

    @property
    def step(self) -> int:
        """Finished steps."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the monitors say."""
        ...

    def finite(self) -> Mapping[str, float | None]:
        """Return the figures."""
        ...


class TrainReporter(Protocol):
    """Is told of each step; a context that ends the display."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, report: Report) -> None:
        """Take a finished step."""


def train_reporter(stream: IO[str], clock: Callable[[], float] = time.monotonic) -> TrainReporter:
    """Return a bar if the stream is a terminal, else JSON lines."""
    return TrainBar(stream) if stream.isatty() else TrainLines(stream, clock)


class TrainLines:
    """One JSON object a line: the first and the last step, one every five seconds, and every warning.

    Each has ``step``, ``of``, ``eta_s`` (null at the first step) and the figures of ``log.jsonl``.
    """

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._first: int | None = None
        self._started = self._said = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, report: Report) -> None:
        """Write a line if it is time."""
        for warning in report.warnings:
            self._write({"event": "warning", "message": warning})
        now = self._clock()
        is_first = self._first is None
        if self._first is None:
            self._first, self._started = report.step, now
        if not is_first and report.step != report.num_steps and now - self._said < _LINE_EVERY_S:
            return
        self._said = now
        done = report.step - self._first  # the first step, which starts everything up, tells nothing of the others
        eta_s = round((report.num_steps - report.step) * (now - self._started) / done, 1) if done else None
        figures = {name: round(value, 6) for name, value in report.finite().items() if value is not None}
        self._write({"event": "train", "step": report.step, "of": report.num_steps, "eta_s": eta_s, **figures})

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


class TrainBar:
    """A bar of the steps with the time left, images a second, memory and losses; above it warnings and k-NN figures."""

    def __init__(self, stream: IO[str]) -> None:
        self._console = Console(file=stream)
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, report: Report) -> None:
        """Show the step."""
        values = report.finite()
        for warning in report.warnings:
            self._console.print(warning, style="yellow", markup=False)
        if values.get("knn_top1") is not None:
            trained, random, pixels = (
                100 * (values.get(f"knn_top1{name}") or 0) for name in ("", "_random", "_pixels")
            )
            self._console.print(
                f"step {report.step}: k-NN {trained:.1f} %, random weights {random:.1f} %, raw pixels {pixels:.1f} %"
            )
        if self._task is None:
            # From the first step seen: the steps of an earlier process say nothing of this one's pace.
            self._task = self._progress.add_task("train", total=report.num_steps, completed=report.step, figures="")
        self._progress.update(self._task, completed=report.step, figures=_figures(values))


def _figures(values: Mapping[str, float | None]) -> str:
    losses = {name: value for name in _SHOWN if (value := values.get(name)) is not None}
    parts = [f"{values.get('images_per_s') or 0:,.1f} images/s", f"{values.get('peak_memory_gb') or 0:.1f} GB"]
    return "  ".join([*parts, *(f"{_SHOWN[name]} {value:.3f}" for name, value in losses.items())])
