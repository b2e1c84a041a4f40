"""The same figures as ``log.jsonl`` for TensorBoard."""

from pathlib import Path
from typing import Any, Self

from curation.dinov2.checkpoint import clear_errors
from curation.dinov2.log import StepReport
from curation.errors import TrainError

_GROUPS = ("loss", "grad_norm", "knn", "teacher")


class EventFiles:
    """Event files that go on as if the run had never been interrupted.

    Args:
        folder: Where they lie.
        step: Finished steps; TensorBoard drops what an earlier process wrote of later ones.

    Raises:
        TrainError: The package is missing, or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        with clear_errors(folder, "event files"):
            self._writer: Any = _writer_class()(str(folder), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, report: StepReport) -> None:
        """Add the figures of a step, losses and gradient norms in groups, and its warnings as text."""
        for name, value in report.finite().items():
            if value is not None:
                self._writer.add_scalar(tag(name), value, report.step)
        for warning in report.warnings:
            self._writer.add_text("warnings", warning, report.step)


def tag(name: str) -> str:
    """Return the name of a figure in TensorBoard: ``loss_ibot`` is ``loss/ibot``."""
    for group in _GROUPS:
        if name == group:
            return f"{group}/total"
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return f"run/{name}"


def check() -> None:
    """Refuse before training begins.

    Raises:
        TrainError: The package is missing.
    """
    _writer_class()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainError(
            "monitors.tensorboard needs the package tensorboard: pip install tensorboard, or set it to false; "
            "log.jsonl has the same figures"
        ) from error
    return SummaryWriter
