"""Student, teacher and what changes them: one step of self-distillation, however its batch is cut.

Several processes and micro-batches give the losses of one process with the whole batch: targets are made of the whole
batch, and so is KoLeo; crops, masks and stochastic depth follow from a sample's place in the run.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curation.dinov2 import colour, phases, sharing
from curation.dinov2.centring import Centrings
from curation.dinov2.config import TrainConfig
from curation.dinov2.data import Batch
from curation.dinov2.drop_path import moved
from curation.dinov2.model import KeptRows
from curation.dinov2.network import Answers, Network, student_and_teacher, update_teacher
from curation.dinov2.objective import Inputs, Pull, Targets, koleo_pulls, objective, teacher_targets
from curation.dinov2.optim import Optimizer
from curation.dinov2.schedules import StepSettings
from curation.dinov2.tensors import whole
from curation.dinov2.world import ALONE, World


@dataclass(frozen=True)
class Lesson:
    """One step.

    Attributes:
        figures: ``loss``, its parts, monitors and gradient norms, over all processes.
        skipped: Whether nothing was learned, because the loss or a gradient is not finite.
    """

    figures: dict[str, float]
    skipped: bool


class Learner:
    """The networks of a run. They begin equal, or with what a checkpoint or the settings give them.

    Args:
        config: Settings of the run.
        device: Where they are.
        world: Processes that train together.

    Attributes:
        student: Learns.
        teacher: Running mean of the student.
        optimizer: What the student learns by, once ``share`` was called.
    """

    optimizer: Optimizer

    def __init__(self, config: TrainConfig, device: torch.device, world: World = ALONE) -> None:
        self._config, self._device, self._world = config, device, world
        self.student, self.teacher = (network.to(device) for network in student_and_teacher(config))
        guide = phases.guide(config)
        self._guide = self.teacher if guide is None else guide.to(device)  # whose answers are targets
        self._centrings = Centrings(config, device, world)
        self._learner: nn.Module = self.student
        sharing.prepare(self._networks(), config)

    def _networks(self) -> dict[Network, None]:
        return dict.fromkeys((self.student, self.teacher, self._guide))

    def begin(self) -> None:
        """Take over the weights that the settings name; without any they stay random."""
        phases.begin(self._config, self.student, self.teacher, self._centrings)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over networks and centres of a checkpoint.

        Raises:
            RuntimeError: Names or shapes are not those of the networks.
            KeyError: Centres are missing.
        """
        for kind, network in (("student", self.student), ("teacher", self.teacher)):
            sharing.load(network, _under(tensors, kind))
        self._centrings.restore(tensors)

    def share(self, *, heads_alone: bool, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Join the networks of all processes, which must have begun with the same, and begin to learn.

        Args:
            heads_alone: Whether the backbone stands still.
            tensors: Of a checkpoint: its moments are taken over; empty: none.
            num_updates: Of the moments.
        """
        self.student.heads_alone = heads_alone
        if self._world.size > 1 and self._config.parallel == "fsdp":
            sharing.cut(self._networks(), self._world, self._device)
        elif self._world.size > 1:
            self._learner = sharing.copied(self.student, self._device)
        self.optimizer = Optimizer(self.student, self._config.optim)
        self.optimizer.restore(tensors, num_updates)

    def _let_backbone_learn(self) -> None:
        self.student.heads_alone = False
        if self._world.size > 1 and self._config.parallel == "ddp":
            self._learner = sharing.copied(self.student, self._device)

    def step(self, parts: Sequence[Batch], now: StepSettings, *, is_watched: bool = False) -> Lesson:
        """Learn from a batch.

        Args:
            parts: What this process has of it, in micro-batches.
            now: Values of the schedules.
            is_watched: Whether monitors look at all of the step.
        """
        config = self._config
        if self.student.heads_alone and now.backbone_lr_mult:
            self._let_backbone_learn()
        inputs = [self._inputs(part) for part in parts]
        kept = [moved(part.kept, self._device) for part in parts]
        with self._precision():
            watchers = self._world if is_watched else None
            targets, figures = teacher_targets(
                self._guide, inputs, now.teacher_temp, config.losses, self._centrings, watchers
            )
        self.optimizer.zero_grad()
        for part_figures in self._backward(inputs, kept, targets):
            for name, value in part_figures.items():
                figures[name] = figures.get(name, torch.zeros((), device=self._device)) + value / len(parts)
        values = self._averaged(figures)
        norms = self.optimizer.clip()
        values |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        skipped = not all(map(math.isfinite, (values["loss"], *norms.values())))
        if not skipped:
            self.optimizer.step(now)
            update_teacher(self.student, self.teacher, now.momentum)
            self._centrings.update()
        return Lesson(values, skipped)

    def encoded(self, x_N3HW: Tensor) -> Tensor:
        """Return the teacher's class tokens, by way of the whole network: its parts may lie in other processes."""
        with torch.no_grad(), self._precision():
            answers: Answers = self.teacher([x_N3HW], None, None)
        return answers.cls_ND

    def gathered(self) -> dict[str, Tensor]:
        """Return the first process's checkpoint, on the CPU; a tensor at a time is put together on the device."""
        networks = (("student", self.student), ("teacher", self.teacher))
        held = {f"{kind}/{name}": value for kind, network in networks for name, value in network.state_dict().items()}
        tensors = {}
        for name, value in {**held, **self.optimizer.state(), **self._centrings.state()}.items():
            full = whole(value)  # where it is in parts all processes must ask
            if self._world.rank == 0:
                tensors[name] = full.detach().cpu()
        return tensors

    def _inputs(self, batch: Batch) -> Inputs:
        views = [
            colour.augment(crops.to(self._device, non_blocking=True), plan, self._config.crops)
            for crops, plan in batch.crops
        ]
        every_patch = self._config.distillation is not None
        return Inputs.of(views, batch.mask_NP, every_patch=every_patch, device=self._device)

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
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.precision == "bfloat16")

    def _averaged(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Return the means over processes."""
        values = self._world.mean(torch.stack([value.float().to(self._device) for value in figures.values()]))
        return dict(zip(figures, values.tolist(), strict=True))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
