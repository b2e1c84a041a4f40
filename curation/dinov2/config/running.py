"""Settings of what surrounds training: monitors, checkpoints, other weights, a cluster."""

from typing import Self

from pydantic import Field, model_validator

from curation.dinov2.evaluate.config import LabelledConfig
from curation.settings import Settings


class SmallSetConfig(LabelledConfig):
    """A labelled set small enough to look at while training."""

    max_train: int | None = Field(5_000, ge=2, description="At most so many images, drawn by the seed; null: all.")
    max_test: int | None = Field(1_000, ge=1, description="At most so many images, drawn by the seed; null: all.")


class KnnMonitorConfig(Settings):
    """A small k-NN of the teacher while it trains; each process works through all of it."""

    data: SmallSetConfig
    every_steps: int = Field(1_000, ge=1, description="Also after the last step.")
    k: int = Field(20, ge=1, description="Neighbours that vote.")
    temperature: float = Field(0.07, gt=0, description="A neighbour of cosine s counts exp(s / temperature).")
    crop_share: float = Field(0.875, gt=0, le=1, description="Side of the central square / short side.")
    batch_size: int = Field(64, ge=1, description="Images per forward pass.")
    workers: int = Field(2, ge=1, le=256, description="Threads that decode; no effect on results.")


class MonitorsConfig(Settings):
    """What is watched while training; nothing here changes weights."""

    every_steps: int = Field(
        10, ge=1, description="Steps from one look at rank, spectrum, distances and prototypes to the next."
    )
    knn: KnnMonitorConfig | None = Field(None, description="A labelled set to look at; null: none.")
    tensorboard: bool = Field(
        False, description="Write event files to tensorboard/ of the output; needs the package tensorboard."
    )


class CheckpointConfig(Settings):
    """When state is saved."""

    every_steps: int = Field(1_000, ge=1)
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept.")
    best_metric: str | None = Field(
        "knn_top1",
        description="Figure of the log that is higher for better weights: the best checkpoint is kept too. Null: none.",
    )


class StartConfig(Settings):
    """Where the first weights come from; optimiser and schedules start anew."""

    run: str | None = Field(
        None, description="Folder of a training run: student, teacher, heads and centres of its newest checkpoint."
    )
    backbone: str | None = Field(
        None,
        description=(
            "A published backbone: .safetensors or .pth, or a folder that timm or transformers loads. Heads are new."
        ),
    )
    head_warmup_steps: int = Field(
        0,
        ge=0,
        description=(
            "The backbone stands still for as many steps while heads learn; its learning rate then rises within "
            "schedule.warmup_steps. As many as schedule.steps: only heads are trained."
        ),
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.run) == bool(self.backbone):
            raise ValueError("give either run or backbone")
        return self


class DistillationConfig(Settings):
    """Learning from a frozen teacher. What is exported as `teacher` is a running mean of the student."""

    teacher: str = Field(min_length=1, description="Folder of the run that trained it, heads included.")


class RayConfig(Settings):
    """Training processes on a Ray cluster: `curate train --ray-address`."""

    workers: int = Field(1, ge=1, le=65_536, description="Processes.")
    cpus: float = Field(1.0, ge=0, description="Of each; readers need some.")
    gpus: float = Field(0.0, ge=0, description="Of each; 1 for training on GPUs.")
    max_restarts: int = Field(3, ge=0, description="All processes go on from the newest checkpoint when one dies.")
