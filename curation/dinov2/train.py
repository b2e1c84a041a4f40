"""The training loop: self-distillation on a manifest, on CPUs or GPUs, that can stop anywhere and go on.

What a step is, ``curation.dinov2.learner`` says; processes may be started by torchrun or by Ray Train.

Source:
    Oquab et al. 2023, "DINOv2: learning robust visual features without supervision".
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, distributed

from curation.dinov2 import export
from curation.dinov2.checkpoint import Best, Checkpoints, ManifestShare, Progress, write_tensors
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batch, Batches, open_manifests, shares
from curation.dinov2.device import device_of, peak_memory_bytes
from curation.dinov2.event_files import EventFiles
from curation.dinov2.learner import Learner, Lesson
from curation.dinov2.log import StepLog, StepReport
from curation.dinov2.opening import fingerprint, open_run
from curation.dinov2.schedules import Schedules, StepSettings
from curation.dinov2.watch import Watch
from curation.dinov2.world import World, clear_failures
from curation.errors import TrainError

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
    manifest: str | None,
    config: TrainConfig,
    output: Path,
    *,
    resume: bool,
    device: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a backbone on a manifest's images.

    On a CPU, with the same number of threads, processes and micro-batches, an interrupted and resumed run ends with the
    weights of an uninterrupted one, to the bit.

    Args:
        manifest: Path or fsspec URL of a manifest (``curation.schema.MANIFEST``); None: those of ``data.manifests``.
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
    target = device_of(device)
    is_own_group = not distributed.is_initialized()
    world = World.join(target)
    has_failed = True
    try:
        with clear_failures():
            with world.together():
                manifests = open_manifests(manifest, config)
                batches = Batches(manifests, config, world, target)
                trained_on = [
                    ManifestShare(images.digest, len(images), share)
                    for images, share in zip(manifests, shares(manifests, config), strict=True)
                ]
            own = torch.tensor([fingerprint(config, trained_on)], device=target)
            if len(set(world.gather(own).tolist())) > 1:
                raise TrainError(
                    "the processes that train together were given different settings or manifests; start all of them "
                    "with the same ones"
                )
            with world.together():
                if world.rank == 0:
                    open_run(output, config, trained_on, resume)
            run = _Run(config, target, world, output)
            if run.progress.step < config.schedule.steps:
                run.go(batches, on_step, should_stop)
            result = run.result()
        has_failed = False
        return result
    finally:
        if is_own_group:
            world.leave(has_failed=has_failed)


class _Run:
    """The state of one run and the loop that changes it."""

    def __init__(self, config: TrainConfig, device: torch.device, world: World, output: Path) -> None:
        self.progress = Progress()
        self._config = config
        self._device = device
        self._world = world
        self._checkpoints = Checkpoints(output, config.checkpoint.keep)
        self._output = output
        self._saved: Path | None = None
        self._schedules = Schedules(config)
        self._is_overdue = False  # a checkpoint: skipped steps would push out those from before them
        self._aside_s = 0.0  # that the latest step spent on what is no training
        with world.together():
            self._watch = Watch(config, device)
            self._learner = Learner(config, device, world)
            tensors = self._begin()
        steps = world.gather(torch.tensor([self.progress.step], device=device)).tolist()
        if len(set(steps)) > 1:
            raise TrainError(
                f"{output}: processes see checkpoints of different steps there ({', '.join(map(str, steps))}); "
                "--output must be one folder that all of them share"
            )
        heads_alone = self._schedules.at(self.progress.step).backbone_lr_mult == 0
        self._learner.share(heads_alone=heads_alone, tensors=tensors, num_updates=self.progress.num_updates)

    def _begin(self) -> dict[str, Tensor]:
        """Take over the newest checkpoint and return its tensors; without one, begin with what the settings name."""
        newest = self._checkpoints.newest()
        if newest is None:
            self._learner.begin()
            return {}
        self.progress, tensors, self._saved = newest
        try:
            self._learner.restore(tensors)
        except (RuntimeError, KeyError) as error:
            raise TrainError(f"{self._saved}: does not fit these settings: {error}") from error
        self._watch.recall(self._output / "log.jsonl", self.progress.step)
        _log.info("going on from %s", self._saved)
        return tensors

    def go(
        self,
        batches: Batches,
        on_step: Callable[[StepReport], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        """Run the steps that are left, or until asked to stop."""
        num_steps = self._config.schedule.steps
        started = time.perf_counter()
        is_first = self._world.rank == 0
        with ExitStack() as files:
            with self._world.together():
                logs = list(self._logs()) if is_first else []
                for log in logs:
                    files.enter_context(log)
            for parts in self._read(batches):
                report = self._step(parts)
                now = time.perf_counter()
                seconds = max(now - started - self._aside_s, 1e-9)
                report.figures["images_per_s"] = self._config.data.batch_size / seconds
                report.figures["peak_memory_gb"] = peak_memory_bytes(self._device) / 1e9
                started = now
                with self._world.together():
                    for log in logs:
                        log.write(report)
                    if is_first:
                        (on_step or _say)(report)
                self._stop_if_hopeless(report)
                stopping = self._any(should_stop is not None and should_stop())
                is_best = self._is_best(report)
                self._is_overdue |= report.step % self._config.checkpoint.every_steps == 0
                is_due = report.step == num_steps or (self._is_overdue and not report.skipped)
                if stopping or is_best or is_due:
                    self._save(is_best)
                    self._is_overdue = False
                    started = time.perf_counter()
                if stopping:
                    _log.info("stopped after step %d of %d", report.step, num_steps)
                    return

    def _logs(self) -> Iterator[StepLog | EventFiles]:
        yield StepLog(self._output / "log.jsonl", self.progress.step)
        if self._config.monitors.tensorboard:
            yield EventFiles(self._output / "tensorboard", self.progress.step)

    def _read(self, batches: Batches) -> Iterator[list[Batch]]:
        """Yield the batches that are left; where one process cannot read its own, what was learned so far is saved."""
        with closing(batches.between(self.progress.step, self._config.schedule.steps)) as left:
            while True:
                try:
                    with self._world.together():
                        parts = next(left, None)
                except Exception:
                    if self.progress.step:
                        self._save(is_best=False)
                    raise
                if parts is None:
                    return
                yield parts

    def result(self) -> TrainResult:
        """Say where the run stands."""
        if self._saved is None:
            raise TrainError(f"{self._output}: no checkpoint was written")
        teacher = self._output / "teacher.safetensors"
        if self._any(self._world.rank == 0 and not teacher.exists()):  # deleted since: the checkpoint has all of it
            self._write_teacher(teacher.name)
        losses = {name: value for name, value in (self.progress.last or {}).items() if name.startswith("loss")}
        return TrainResult(
            steps=self.progress.step,
            finished=self.progress.step >= self._config.schedule.steps,
            checkpoint=self._saved,
            teacher=teacher,
            log=self._output / "log.jsonl",
            losses=losses,
        )

    def _step(self, parts: list[Batch]) -> StepReport:
        step = parts[0].step
        now = self._schedules.at(step)
        lesson = self._learner.step(parts, now, is_watched=self._watch.is_due(step + 1))
        num_replaced = self._world.total(sum(part.num_replaced for part in parts))
        return self._report(step, now, lesson, num_replaced)

    def _any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        return self._world.total(int(flag)) > 0

    def _report(self, step: int, now: StepSettings, lesson: Lesson, num_replaced: int) -> StepReport:
        before, skipped = self.progress, lesson.skipped
        num_replaced += before.num_replaced
        num_skipped = before.num_skipped + skipped
        figures = dict(lesson.figures)
        figures |= {**vars(now), "replaced_images": float(num_replaced), "skipped_steps": float(num_skipped)}
        began = time.perf_counter()
        figures |= self._watch.knn_figures(step + 1, self._learner.encoded)
        self._aside_s = time.perf_counter() - began
        warnings = self._watch.warnings(step + 1, figures)
        report = StepReport(step + 1, self._config.schedule.steps, skipped, figures, warnings)
        self.progress = Progress(
            step=report.step,
            num_updates=self._learner.optimizer.num_updates,
            num_skipped=num_skipped,
            skipped_in_a_row=before.skipped_in_a_row + 1 if skipped else 0,
            num_replaced=num_replaced,
            last=report.finite(),
            best=before.best,
        )
        return report

    def _stop_if_hopeless(self, report: StepReport) -> None:
        in_a_row = self.progress.skipped_in_a_row
        if report.skipped:
            _log.warning("step %d was skipped: its loss or a gradient is not finite", report.step)
            if report.step == report.num_steps:
                _log.warning("the run ends with the weights of step %d", report.step - in_a_row)
        if in_a_row >= self._config.optim.max_nonfinite_steps:
            bad = [name for name, value in report.figures.items() if not math.isfinite(value)]
            raise TrainError(
                f"the last {in_a_row} steps up to step {report.step} were not finite ({', '.join(bad)}); begin again "
                "in another folder with a lower optim.base_lr or precision float32 (start.run takes over the weights "
                "of the newest checkpoint; where these are ruined already, delete it, and the one before is taken)"
            )

    def _is_best(self, report: StepReport) -> bool:
        """Return whether the metric that checkpoints are compared by is there and better than ever; remember it."""
        metric, best = self._config.checkpoint.best_metric or "", self.progress.best
        value = report.figures.get(metric, math.nan)
        beaten = best is None or best.metric != metric or value > best.value
        if not self._any(beaten and math.isfinite(value)):
            return False
        self.progress = replace(self.progress, best=Best(report.step, metric, value))
        return True

    def _save(self, is_best: bool) -> None:
        tensors = self._learner.gathered()
        self._write_teacher("teacher.safetensors")
        if is_best:
            self._write_teacher("teacher_best.safetensors")
        self._saved = self._checkpoints.path(self.progress)
        with self._world.together():
            if self._world.rank == 0:
                self._checkpoints.save(self.progress, tensors)

    def _write_teacher(self, name: str) -> None:
        backbone = self._learner.teacher.backbone
        state = export.timm_state(backbone)  # of all processes
        with self._world.together():
            if self._world.rank == 0:
                write_tensors(self._output / name, state, export.metadata(backbone, self.progress.step))


def _say(report: StepReport) -> None:
    """Stand in for a caller that takes no reports: warnings must not be lost."""
    for warning in report.warnings:
        _log.warning("%s", warning)
