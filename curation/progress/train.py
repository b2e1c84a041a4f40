"""What training says while it works: a bar with its figures on a terminal, JSON lines elsewhere."""

import time
from collections.abc import Mapping
from typing import IO, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from curation.progress.display import Bar, Clock, Lines, Pace

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


def train_reporter(stream: IO[str], clock: Clock = time.monotonic) -> "TrainBar | TrainLines":
    """Return what is told of each step: a bar if the stream is a terminal, else JSON lines."""
    return TrainBar(stream) if stream.isatty() else TrainLines(stream, clock)


class TrainLines(Lines):
    """A line for the first and the last step, one every five seconds, and every warning.

    Each has ``step``, ``of``, ``eta_s`` (null at the first step) and the figures of ``log.jsonl``.
    """

    _pace: Pace | None = None

    def __call__(self, report: Report) -> None:
        """Write a line if it is time."""
        for warning in report.warnings:
            self.write(event="warning", message=warning)
        is_first = self._pace is None
        if self._pace is None:  # the first step, which starts everything up, tells nothing of the others
            self._pace = Pace(report.step, self._clock)
        if is_first or report.step == report.num_steps or self.is_due():
            figures = {name: round(value, 6) for name, value in report.finite().items() if value is not None}
            eta_s = self._pace.left_s(report.step, report.num_steps)
            self.tell(event="train", step=report.step, of=report.num_steps, eta_s=eta_s, **figures)


class TrainBar(Bar):
    """A bar of the steps with the time left, images a second, memory and losses; above it warnings and k-NN figures."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(
            stream,
            TextColumn("train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        self._task: TaskID | None = None

    def __call__(self, report: Report) -> None:
        """Show the step."""
        values = report.finite()
        for warning in report.warnings:
            self.print(warning, style="yellow")
        if values.get("knn_top1") is not None:
            trained, random, pixels = (
                100 * (values.get(f"knn_top1{name}") or 0) for name in ("", "_random", "_pixels")
            )
            self.print(
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
