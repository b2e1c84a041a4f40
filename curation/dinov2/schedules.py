"""Values that change over the run, as functions of the zero-based step."""

import math
from dataclasses import dataclass

from curation.dinov2.config import TrainConfig


@dataclass(frozen=True)
class CosineSchedule:
    """``frozen`` zeros, then a linear warm-up that includes both of its ends, then a half cosine from base to final.

    The base value therefore occurs twice, and the final value is first reached at ``steps``.
    """

    base: float
    final: float
    steps: int
    warmup: int = 0
    start: float = 0.0
    frozen: int = 0

    def __call__(self, step: int) -> float:
        """Return the value at a zero-based step."""
        if step < self.frozen:
            return 0.0
        step -= self.frozen
        if step < self.warmup:
            return self.start + (self.base - self.start) * (step / (self.warmup - 1) if self.warmup > 1 else 0.0)
        length = self.steps - self.frozen - self.warmup
        done = step - self.warmup
        if done >= length:
            return self.final
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * done / length))


@dataclass(frozen=True)
class StepSettings:
    """Schedule values of one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    backbone_lr_mult: float = 1.0


class Schedules:
    """All schedules of a run."""

    def __init__(self, config: TrainConfig) -> None:
        plan = config.schedule
        lr = config.optim.base_lr * math.sqrt(config.data.batch_size / 1024)
        self._lr = CosineSchedule(lr, config.optim.min_lr, plan.steps, warmup=plan.warmup_steps)
        self._decay = CosineSchedule(*config.optim.weight_decay, plan.steps)
        self._momentum = CosineSchedule(*plan.momentum, plan.steps)
        warm, self._temp = plan.teacher_temp
        steps = plan.teacher_temp_warmup_steps
        self._temp_warmup = CosineSchedule(self._temp, self._temp, steps, warmup=steps, start=warm)
        self._frozen = plan.freeze_last_layer_steps
        self._heads_alone = 0 if config.start is None else config.start.head_warmup_steps
        self._backbone_warmup = max(1, plan.warmup_steps)

    def at(self, step: int) -> StepSettings:
        """Return the values of a zero-based step."""
        lr = self._lr(step)
        return StepSettings(
            lr=lr,
            last_layer_lr=0.0 if step < self._frozen else lr,
            weight_decay=self._decay(step),
            momentum=self._momentum(step),
            teacher_temp=self._temp_warmup(step),
            backbone_lr_mult=self._backbone_lr_mult(step),
        )

    def _backbone_lr_mult(self, step: int) -> float:
        """Return 0 while heads learn alone, then a linear rise to 1."""
        if not self._heads_alone:
            return 1.0
        return min(1.0, max(0, step - self._heads_alone + 1) / self._backbone_warmup)
