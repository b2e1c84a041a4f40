"""Settings of what is learned and how: losses, optimiser, schedules."""

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.settings import Settings


class LossesConfig(Settings):
    """Weights and temperatures of the objective."""

    dino_weight: float = Field(1.0, ge=0)
    ibot_weight: float = Field(1.0, ge=0)
    koleo_weight: float = Field(0.1, ge=0, description="For each of the two global crops.")
    student_temp: float = Field(0.1, gt=0)
    centring: Literal["sinkhorn_knopp", "softmax"] = Field(
        "sinkhorn_knopp",
        description="How the teacher's scores become targets. softmax: minus a running mean of them (DINO, iBOT).",
    )
    sinkhorn_rounds: int = Field(3, ge=1, le=100)
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="Of the running mean of softmax centring.")
    centre_weighting: Literal["rows", "processes"] = Field(
        "rows",
        description="rows: the mean of all rows; processes: that of each process's mean, as in the published code.",
    )
    koleo_scope: Literal["global", "local"] = Field(
        "global",
        description=(
            "Among which images KoLeo looks for neighbours. global: all of the step; local: those of a process's "
            "micro-batch, as in the published code."
        ),
    )
    masked_share: float = Field(0.5, ge=0, le=1, description="Share of the global crops that get a mask.")
    mask_ratio: tuple[float, float] = Field((0.1, 0.5), description="Share of patches masked, from and to.")
    mask_count: Literal["exact", "reference"] = Field(
        "exact",
        description=(
            "exact: each mask has the patches asked for, so shapes never change; reference: some have fewer, as in the "
            "published code."
        ),
    )

    chunk_rows: int = Field(
        1024,
        ge=1,
        description="Rows of prototype scores in memory at a time; no effect on results but rounding.",
    )

    @model_validator(mode="after")
    def _mask_ratio(self) -> Self:
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must rise within 0 and 1, got {low} to {high}")
        return self


class OptimConfig(Settings):
    """AdamW."""

    base_lr: float = Field(4e-3, gt=0, description="At a batch of 1024; scaled by sqrt(batch size / 1024).")
    min_lr: float = Field(1e-6, ge=0, description="At the end; not scaled.")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: tuple[float, float] = Field((0.04, 0.4), description="From and to, cosine.")
    layer_decay: float = Field(0.9, gt=0, le=1, description="Factor of the learning rate from block to block below.")
    patch_embed_lr_mult: float = Field(0.2, gt=0, le=1)
    clip_norm: float = Field(3.0, gt=0, description="Gradient norm of backbone, DINO head and iBOT head, each.")
    max_nonfinite_steps: int = Field(10, ge=1, description="As many non-finite losses in a row stop the run.")

    @model_validator(mode="after")
    def _betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if min(self.weight_decay) < 0:
            raise ValueError("weight_decay must not be negative")
        return self


class ScheduleConfig(Settings):
    """What changes over the run, counted in steps."""

    steps: int = Field(125_000, ge=1)
    warmup_steps: int = Field(12_500, ge=0, description="Linear rise of the learning rate from 0.")
    freeze_last_layer_steps: int = Field(1_250, ge=0, description="Prototypes stand still at first.")
    momentum: tuple[float, float] = Field((0.992, 1.0), description="Of the teacher, from and to, cosine.")
    teacher_temp: tuple[float, float] = Field((0.04, 0.07), description="From and to; equal: fixed.")
    teacher_temp_warmup_steps: int = Field(37_500, ge=0, description="Linear from the first to the second.")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}")
        if not all(0 <= m <= 1 for m in self.momentum):
            raise ValueError("momentum must be within 0 and 1")
        if min(self.teacher_temp) <= 0:
            raise ValueError("teacher_temp must be positive")
        return self
