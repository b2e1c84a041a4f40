"""The training loop: self-distillation on a manifest, on the CPU or one GPU, that can stop anywhere and go on.

Source:
    Oquab et al. 2023, "DINOv2: learning robust visual features without supervision".
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from curation.dinov2 import colour, export
from curation.dinov2.centring import Centrings
from curation.dinov2.checkpoint import Checkpoints, Identity, Progress, differences, flattened, write_tensors
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batch, Batches, ManifestImages
from curation.dinov2.log import StepLog, StepReport
from curation.dinov2.network import kept_rows, student_and_teacher, update_teacher
from curation.dinov2.objective import Inputs, Outcome, objective, teacher_targets
from curation.dinov2.optim import Optimizer
from curation.dinov2.schedules import Schedules
from curation.errors import TrainError

# Settings that change no weight: a run may go on with others.
FREE_SETTINGS = ("checkpoint.", "data.workers", "data.prefetch_batches", "optim.max_nonfinite_steps")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: Finished steps.
        finished: Whether these are all; false when it was asked to stop.
        checkpoint: Tensors of the newest checkpoint.
        teacher: The teacher's backbone under timm's names.
        log: The JSON-lines log.
        losses: ``loss`` and its parts at the last step; None where they were not finite.
    """

    steps: int
    finished: bool
    checkpoint: Path
    teacher: Path
    log: Path
    losses: dict[str, float | None]


def train(
    manifest: str,
    config: TrainConfig,
    output: Path,
    *,
    resume: bool,
    device: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a backbone on a manifest's images.

    On a CPU, with the same number of threads, an interrupted and resumed run ends with the weights of an uninterrupted
    one, to the bit.

    Args:
        manifest: Path or fsspec URL of a manifest (``curation.schema.MANIFEST``).
        config: Settings.
        output: Folder for checkpoints, log and ``teacher.safetensors``; on a local disk.
        resume: Go on from the newest checkpoint in ``output``; starts anew in a folder that is empty or not there.
        device: Such as ``cpu`` or ``cuda``; None: a GPU if there is one.
        on_step: Called after each step.
        should_stop: Asked after each step; true saves a checkpoint and returns.

    Raises:
        TrainError: If the manifest cannot be used, the folder holds another run, or losses stay non-finite.
        DiskFullError: If a checkpoint does not fit; earlier ones stay.
    """
    target = _device(device)
    dataset = ManifestImages(manifest, config.data.max_image_bytes)
    batches = Batches(dataset, config)
    checkpoints = _open(output, config, dataset.digest, resume)
    run = _Run(config, target, checkpoints, output)
    run.restore()
    if run.progress.step < config.schedule.steps:
        run.go(batches, on_step, should_stop)
    return run.result()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either for a device that is not there
        raise TrainError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try cpu") from error
    return device


def _open(output: Path, config: TrainConfig, digest: str, resume: bool) -> Checkpoints:
    checkpoints = Checkpoints(output, config.checkpoint.keep)
    identity = Identity(flattened(config.model_dump(mode="json")), digest)
    if output.exists() and not output.is_dir():
        raise TrainError(f"{output}: is not a folder; give another one")
    used = output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir())
    if used and not resume:
        raise TrainError(f"{output}: is not empty; go on with --resume, or give another folder")
    before = checkpoints.identity() if used else None
    if used and before is None:
        raise TrainError(f"{output}: holds no training run to resume; give another folder")
    if before is not None:
        if before.manifest_digest != digest:
            raise TrainError(
                f"{output}: was trained on manifest {before.manifest_digest}, but this one is {digest}; "
                "resume with the same manifest, or give another folder"
            )
        changed = differences(before.settings, identity.settings, FREE_SETTINGS)
        if changed:
            raise TrainError(
                f"{output}: was started with other settings ({'; '.join(changed)}); "
                "resume with the same ones, or give another folder"
            )
    checkpoints.start(identity)
    return checkpoints


class _Run:
    """The state of one run and the loop that changes it."""

    def __init__(self, config: TrainConfig, device: torch.device, checkpoints: Checkpoints, output: Path) -> None:
        self.progress = Progress()
        self._config = config
        self._device = device
        self._checkpoints = checkpoints
        self._output = output
        self._saved: Path | None = None
        student, teacher = student_and_teacher(config)
        self._student, self._teacher = student.to(device), teacher.to(device)
        self._optimizer = Optimizer(self._student, config.optim)
        self._centrings = Centrings(config, device)
        self._schedules = Schedules(config)
        self._autocast = config.precision == "bfloat16" and device.type != "cpu"

    def restore(self) -> None:
        """Take over the newest checkpoint, if there is one."""
        newest = self._checkpoints.newest()
        if newest is None:
            return
        progress, tensors, path = newest
        try:
            for kind, network in (("student", self._student), ("teacher", self._teacher)):
                network.load_state_dict(_under(tensors, kind))
            self._optimizer.restore(tensors, progress.num_updates)
            self._centrings.restore(tensors)
        except (RuntimeError, KeyError) as error:
            raise TrainError(f"{path}: does not fit these settings: {error}") from error
        self.progress, self._saved = progress, path
        _log.info("going on from %s", path)

    def go(
        self,
        batches: Batches,
        on_step: Callable[[StepReport], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        """Run the steps that are left, or until asked to stop."""
        num_steps = self._config.schedule.steps
        started = time.perf_counter()
        with StepLog(self._output / "log.jsonl", self.progress.step) as log:
            for batch in batches.between(self.progress.step, num_steps):
                report = self._step(batch)
                now = time.perf_counter()
                report.figures["images_per_s"] = self._config.data.batch_size / max(now - started, 1e-9)
                started = now
                log.write(report)
                if on_step is not None:
                    on_step(report)
                self._stop_if_hopeless(report)
                stopping = should_stop is not None and should_stop()
                if stopping or report.step == num_steps or report.step % self._config.checkpoint.every_steps == 0:
                    self._save()
                    started = time.perf_counter()
                if stopping:
                    _log.info("stopped after step %d of %d", report.step, num_steps)
                    return

    def result(self) -> TrainResult:
        """Say where the run stands."""
        if self._saved is None:
            raise TrainError(f"{self._output}: no checkpoint was written")
        teacher = self._output / "teacher.safetensors"
        if not teacher.exists():  # deleted since: the checkpoint has all that it is made of
            self._write_teacher()
        losses = {name: value for name, value in (self.progress.last or {}).items() if name.startswith("loss")}
        return TrainResult(
            steps=self.progress.step,
            finished=self.progress.step >= self._config.schedule.steps,
            checkpoint=self._saved,
            teacher=teacher,
            log=self._output / "log.jsonl",
            losses=losses,
        )

    def _step(self, batch: Batch) -> StepReport:
        config, now = self._config, self._schedules.at(batch.step)
        inputs = self._inputs(batch)
        kept = kept_rows(config, batch.step, self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            targets = teacher_targets(self._teacher, inputs, now.teacher_temp, config.losses, self._centrings)
            outcome = objective(self._student, inputs, targets, config.losses, kept)
        figures = _floats(outcome)
        skipped = not math.isfinite(figures["loss"])
        if not skipped:
            self._optimizer.zero_grad()
            outcome.total.backward()  # type: ignore[no-untyped-call]
            norms = self._optimizer.clip()
            figures |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
            skipped = not all(map(math.isfinite, norms.values()))
        if not skipped:
            self._optimizer.step(now)
            update_teacher(self._student, self._teacher, now.momentum)
            self._centrings.update()
        figures |= vars(now)
        return self._report(batch, figures, skipped)

    def _report(self, batch: Batch, figures: dict[str, float], skipped: bool) -> StepReport:
        before = self.progress
        num_replaced = before.num_replaced + batch.num_replaced
        num_skipped = before.num_skipped + skipped
        figures |= {"replaced_images": float(num_replaced), "skipped_steps": float(num_skipped)}
        report = StepReport(batch.step + 1, self._config.schedule.steps, skipped, figures)
        self.progress = Progress(
            step=report.step,
            num_updates=self._optimizer.num_updates,
            num_skipped=num_skipped,
            skipped_in_a_row=before.skipped_in_a_row + 1 if skipped else 0,
            num_replaced=num_replaced,
            last=report.finite(),
        )
        return report

    def _inputs(self, batch: Batch) -> Inputs:
        views = [
            colour.augment(crops.to(self._device), plan.to(self._device), self._config.crops)
            for crops, plan in batch.crops
        ]
        return Inputs.of(views, batch.mask_NP.to(self._device))

    def _stop_if_hopeless(self, report: StepReport) -> None:
        in_a_row = self.progress.skipped_in_a_row
        if report.skipped:
            _log.warning("step %d was skipped: its loss or a gradient is not finite", report.step)
        if in_a_row >= self._config.optim.max_nonfinite_steps:
            bad = [name for name, value in report.figures.items() if not math.isfinite(value)]
            raise TrainError(
                f"the last {in_a_row} steps up to step {report.step} were not finite ({', '.join(bad)}); "
                "lower optim.base_lr, use precision float32, and resume from an earlier checkpoint"
            )

    def _save(self) -> None:
        tensors = {
            **{f"student/{name}": value for name, value in self._student.state_dict().items()},
            **{f"teacher/{name}": value for name, value in self._teacher.state_dict().items()},
            **self._optimizer.state(),
            **self._centrings.state(),
        }
        self._write_teacher()
        self._saved = self._checkpoints.save(self.progress, tensors)

    def _write_teacher(self) -> None:
        backbone = self._teacher.backbone
        teacher = self._output / "teacher.safetensors"
        write_tensors(teacher, export.timm_state(backbone), export.metadata(backbone, self.progress.step))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _floats(outcome: Outcome) -> dict[str, float]:
    return {
        "loss": float(outcome.total.detach()),
        **{name: float(value) for name, value in {**outcome.parts, **outcome.monitors}.items()},
    }
