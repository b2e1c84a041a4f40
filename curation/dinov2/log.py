"""The JSON-lines log of a run: one line a step."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Self

from curation.dinov2.checkpoint import clear_errors


@dataclass(frozen=True)
class StepReport:
    """One finished step.

    Attributes:
        step: Finished steps, this one included.
        num_steps: Steps of the whole run.
        skipped: Whether weights stayed as they were because a loss or gradient was not finite.
        figures: Losses (``loss`` and its weighted parts ``loss_*``, which sum to it), schedule values, gradient norms,
            monitors, images a second; at their intervals rank, spectrum, distances and ``knn_top1``.
        warnings: What the monitors give reason to say, in words.
    """

    step: int
    num_steps: int
    skipped: bool
    figures: dict[str, float]
    warnings: tuple[str, ...] = ()

    def finite(self) -> dict[str, float | None]:
        """Return the figures with null for what JSON cannot say."""
        return {name: value if math.isfinite(value) else None for name, value in self.figures.items()}


class StepLog:
    """Append-only ``log.jsonl`` that goes on as if it had never been interrupted.

    Args:
        path: The file.
        step: Finished steps; later lines, and a line cut short by a kill, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._step = step

    def __enter__(self) -> Self:
        with clear_errors(self._path, "the log"):
            self._cut()
            self._file: TextIOWrapper = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, report: StepReport) -> None:
        """Append one line and hand it to the operating system, so that a killed process loses none."""
        line: dict[str, object] = {"step": report.step, "skipped": report.skipped, **report.finite()}
        if report.warnings:
            line["warnings"] = report.warnings
        with clear_errors(self._path, "the log"):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def _cut(self) -> None:
        if not self._path.exists():
            return
        length = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not 0 < _step_of(line) <= self._step:
                    break
                length += len(line)
        os.truncate(self._path, length)


def read(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a log; one that a kill cut short ends it."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
