"""The training loop: self-distillation on a manifest, on CPUs or GPUs, that can stop anywhere and go on.

Several processes (torchrun, Ray Train) and micro-batches give the losses of one process with the whole batch: samples,
crops, masks and stochastic depth follow from a sample's place in the run, targets are made of the whole batch, and so
is KoLeo.

Source:
    Oquab et al. 2023, "DINOv2: learning robust visual features without supervision".
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from curation.dinov2 import colour, export, phases, sharing
from curation.dinov2.centring import Centrings
from curation.dinov2.checkpoint import Best, Checkpoints, ManifestShare, Progress, write_tensors
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batch, Batches, open_manifests, shares
from curation.dinov2.device import device_of, peak_memory_bytes
from curation.dinov2.event_files import EventFiles
from curation.dinov2.log import StepLog, StepReport
from curation.dinov2.model import KeptRows
from curation.dinov2.network import Answers, Network, kept_rows, student_and_teacher, update_teacher
from curation.dinov2.objective import Inputs, Pull, Targets, koleo_pulls, objective, teacher_targets
from curation.dinov2.opening import fingerprint, open_run
from curation.dinov2.optim import Optimizer
from curation.dinov2.schedules import Schedules, StepSettings
from curation.dinov2.tensors import whole
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
            return run.result()
    finally:
        if is_own_group:
            world.leave()


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
        self._centrings = Centrings(config, device, world)
        self._schedules = Schedules(config)
        self._autocast = config.precision == "bfloat16"
        self._aside_s = 0.0  # that the latest step spent on what is no training
        with world.together():
            self._watch = Watch(config, device)
            self._student, self._teacher, self._guide = self._networks()
            tensors = self._begin()
        self._learner: nn.Module = self._student
        self._share()
        self._optimizer = Optimizer(self._student, config.optim)
        self._optimizer.restore(tensors, self.progress.num_updates)

    def _networks(self) -> tuple[Network, Network, Network]:
        """Return student, teacher and whoever's answers are targets: the teacher, but for distillation."""
        student, teacher = (network.to(self._device) for network in student_and_teacher(self._config))
        guide = phases.guide(self._config)
        networks = student, teacher, teacher if guide is None else guide.to(self._device)
        sharing.prepare(dict.fromkeys(networks), self._config)
        return networks

    def _begin(self) -> dict[str, Tensor]:
        """Take over the newest checkpoint and return its tensors; without one, begin with what the settings name."""
        newest = self._checkpoints.newest()
        if newest is None:
            phases.begin(self._config, self._student, self._teacher, self._centrings)
            return {}
        self.progress, tensors, self._saved = newest
        try:
            for kind, network in (("student", self._student), ("teacher", self._teacher)):
                sharing.load(network, _under(tensors, kind))
            self._centrings.restore(tensors)
        except (RuntimeError, KeyError) as error:
            raise TrainError(f"{self._saved}: does not fit these settings: {error}") from error
        self._watch.recall(self._output / "log.jsonl", self.progress.step)
        _log.info("going on from %s", self._saved)
        return tensors

    def _share(self) -> None:
        """Join the networks of all processes, which must have begun with the same."""
        steps = self._world.gather(torch.tensor([self.progress.step], device=self._device)).tolist()
        if len(set(steps)) > 1:
            raise TrainError(
                f"{self._output}: processes see checkpoints of different steps there ({', '.join(map(str, steps))}); "
                "--output must be one folder that all of them share"
            )
        self._student.heads_alone = self._schedules.at(self.progress.step).backbone_lr_mult == 0
        if self._world.size > 1 and self._config.parallel == "fsdp":
            sharing.cut(dict.fromkeys((self._student, self._teacher, self._guide)), self._world, self._device)
        elif self._world.size > 1:
            self._learner = sharing.copied(self._student, self._device)

    def _let_backbone_learn(self) -> None:
        self._student.heads_alone = False
        if self._world.size > 1 and self._config.parallel == "ddp":
            self._learner = sharing.copied(self._student, self._device)

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
                is_due = report.step == num_steps or report.step % self._config.checkpoint.every_steps == 0
                if stopping or is_best or is_due:
                    self._save(is_best)
                    started = time.perf_counter()
                if stopping:
                    _log.info("stopped after step %d of %d", report.step, num_steps)
                    return

    def _logs(self) -> Iterator[StepLog | EventFiles]:
        yield StepLog(self._output / "log.jsonl", self.progress.step)
        if self._config.monitors.tensorboard:
            yield EventFiles(self._output / "tensorboard", self.progress.step)

    def _encoded(self, x_N3HW: Tensor) -> Tensor:
        """Return the teacher's class tokens, by way of the whole network: its parts may lie in other processes."""
        with torch.no_grad(), self._precision():
            answers: Answers = self._teacher([x_N3HW], None, None)
        return answers.cls_ND

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
        config, step = self._config, parts[0].step
        now = self._schedules.at(step)
        if self._student.heads_alone and now.backbone_lr_mult:
            self._let_backbone_learn()
        inputs = [self._inputs(part) for part in parts]
        kept = [kept_rows(config, step, part.images, self._device) for part in parts]
        with self._precision():
            watchers = self._world if self._watch.is_due(step + 1) else None
            targets, figures = teacher_targets(
                self._guide, inputs, now.teacher_temp, config.losses, self._centrings, watchers
            )
        self._optimizer.zero_grad()
        for part_figures in self._backward(inputs, kept, targets):
            for name, value in part_figures.items():
                figures[name] = figures.get(name, torch.zeros((), device=self._device)) + value / len(parts)
        values = self._averaged(figures)
        norms = self._optimizer.clip()
        values |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        skipped = not all(map(math.isfinite, (values["loss"], *norms.values())))
        if not skipped:
            self._optimizer.step(now)
            update_teacher(self._student, self._teacher, now.momentum)
            self._centrings.update()
        num_replaced = self._world.sum(torch.tensor(sum(part.num_replaced for part in parts), device=self._device))
        return self._report(step, now, values, int(num_replaced), skipped)

    def _backward(
        self, inputs: Sequence[Inputs], kept: Sequence[KeptRows | None], targets: Sequence[Targets]
    ) -> Iterator[dict[str, Tensor]]:
        """Add up the gradients of all parts; yield each part's losses."""
        config, last = self._config.losses, len(inputs) - 1
        pulls: list[Pull | None] = [None] * len(inputs)
        is_global = config.koleo_weight > 0 and config.koleo_scope == "global"
        if is_global and last > 0:  # one more look at the global crops, so that no part's activations have to stay
            with torch.no_grad(), self._precision():
                seen = [self._class_tokens(part, rows) for part, rows in zip(inputs, kept, strict=True)]
            pulls = list(koleo_pulls(seen, self._world))
        for index, (part, rows, target) in enumerate(zip(inputs, kept, targets, strict=True)):
            with nullcontext() if index == last else sharing.unsynced(self._learner):
                with self._precision():
                    answers = part.ask(self._learner, config, rows)
                    if is_global and last == 0 and self._world.size > 1:
                        pulls = list(koleo_pulls([answers.cls_ND], self._world))
                    outcome = objective(answers, part, target, config, pulls[index])
                del answers  # or their prototypes would be in memory as long as the activations
                (outcome.total / len(inputs)).backward()  # type: ignore[no-untyped-call]
            yield {"loss": outcome.total.detach(), **outcome.parts, **outcome.monitors}

    def _class_tokens(self, part: Inputs, kept: KeptRows | None) -> Tensor:
        """Return what the student's class tokens of the global crops will be."""
        mask_NP = part.mask_NP if self._config.losses.masked_share else None
        whole_crops = None if kept is None else [stacks[:1] for stacks in kept]
        answers: Answers = self._learner(part.views[:1], mask_NP, None, whole_crops)
        return answers.cls_ND

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def _averaged(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Return the means over processes."""
        values = self._world.mean(torch.stack([value.float().to(self._device) for value in figures.values()]))
        return dict(zip(figures, values.tolist(), strict=True))

    def _any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        return bool(self._world.sum(torch.tensor(float(flag), device=self._device)) > 0)

    def _report(
        self, step: int, now: StepSettings, figures: dict[str, float], num_replaced: int, skipped: bool
    ) -> StepReport:
        before = self.progress
        num_replaced += before.num_replaced
        num_skipped = before.num_skipped + skipped
        figures |= {**vars(now), "replaced_images": float(num_replaced), "skipped_steps": float(num_skipped)}
        began = time.perf_counter()
        figures |= self._watch.knn_figures(step + 1, self._encoded)
        self._aside_s = time.perf_counter() - began
        warnings = self._watch.warnings(step + 1, figures)
        report = StepReport(step + 1, self._config.schedule.steps, skipped, figures, warnings)
        self.progress = Progress(
            step=report.step,
            num_updates=self._optimizer.num_updates,
            num_skipped=num_skipped,
            skipped_in_a_row=before.skipped_in_a_row + 1 if skipped else 0,
            num_replaced=num_replaced,
            last=report.finite(),
            best=before.best,
        )
        return report

    def _inputs(self, batch: Batch) -> Inputs:
        views = [
            colour.augment(crops.to(self._device, non_blocking=True), plan, self._config.crops)
            for crops, plan in batch.crops
        ]
        whole = self._config.distillation is not None
        return Inputs.of(views, batch.mask_NP, every_patch=whole, device=self._device)

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
                "of the newest checkpoint)"
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
        tensors = self._gathered()
        self._write_teacher("teacher.safetensors")
        if is_best:
            self._write_teacher("teacher_best.safetensors")
        self._saved = self._checkpoints.path(self.progress)
        with self._world.together():
            if self._world.rank == 0:
                self._checkpoints.save(self.progress, tensors)

    def _gathered(self) -> dict[str, Tensor]:
        """Return the first process's checkpoint, on the CPU; a tensor at a time is put together on the device."""
        networks = (("student", self._student), ("teacher", self._teacher))
        held = {f"{kind}/{name}": value for kind, network in networks for name, value in network.state_dict().items()}
        tensors = {}
        for name, value in {**held, **self._optimizer.state(), **self._centrings.state()}.items():
            full = whole(value)  # where it is in parts all processes must ask
            if self._world.rank == 0:
                tensors[name] = full.detach().cpu()
        return tensors

    def _write_teacher(self, name: str) -> None:
        backbone = self._teacher.backbone
        state = export.timm_state(backbone)  # of all processes
        with self._world.together():
            if self._world.rank == 0:
                write_tensors(self._output / name, state, export.metadata(backbone, self.progress.step))


def _say(report: StepReport) -> None:
    """Stand in for a caller that takes no reports: warnings must not be lost."""
    for warning in report.warnings:
        _log.warning("%s", warning)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
