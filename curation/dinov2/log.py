"""The JSON-lines log of a run: one line a step."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Self

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
        step: Finished steps; what comes after the line of that step is dropped.
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
        kept = read = 0
        with self._path.open("rb") as file:
            for line in file:
                read += len(line)
                if 0 < (_parsed(line) or {"step": 0})["step"] <= self._step:
                    kept = read
        os.truncate(self._path, kept)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log; what a kill cut short, or something else wrote into it, is passed over."""
    with path.open("rb") as file:
        yield from filter(None, map(_parsed, file))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None
