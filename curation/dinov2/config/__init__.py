"""Settings of a training run: ``curation.settings.load(TrainConfig, "configs/dinov2/tiny.yaml")``."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from curation.config.images import ImagesConfig
from curation.dinov2.config.learning import LossesConfig, OptimConfig, ScheduleConfig
from curation.dinov2.config.network import HeadConfig, HeadsConfig, ModelConfig
from curation.dinov2.config.running import (
    CheckpointConfig,
    DistillationConfig,
    KnnMonitorConfig,
    MonitorsConfig,
    RayConfig,
    StartConfig,
)
from curation.dinov2.config.samples import CropsConfig, DataConfig
from curation.settings import Settings

__all__ = [
    "CheckpointConfig",
    "CropsConfig",
    "DataConfig",
    "DistillationConfig",
    "HeadConfig",
    "HeadsConfig",
    "KnnMonitorConfig",
    "LossesConfig",
    "ModelConfig",
    "MonitorsConfig",
    "OptimConfig",
    "RayConfig",
    "ScheduleConfig",
    "StartConfig",
    "TrainConfig",
]

# What a recipe sets that the file leaves out. Sources: arXiv 2104.14294 (DINO), 2111.07832 (iBOT).
_DINO_OPTIM = {"base_lr": 2e-3, "layer_decay": 1.0, "patch_embed_lr_mult": 1.0}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dinov2": {},
    "dino": {
        "losses": {"centring": "softmax", "ibot_weight": 0.0, "masked_share": 0.0, "koleo_weight": 0.0},
        "optim": _DINO_OPTIM,
        "schedule": {"momentum": (0.996, 1.0)},
    },
    "ibot": {
        "losses": {"centring": "softmax", "koleo_weight": 0.0},
        "heads": {"dino": {"prototypes": 8192}},
        "optim": _DINO_OPTIM,
        "schedule": {"momentum": (0.996, 1.0)},
    },
}


class TrainConfig(Settings):
    """Everything about a training run but the manifest and the output folder."""

    seed: int = Field(0, ge=0, lt=2**63)
    preset: Literal["dinov2", "ibot", "dino"] = Field(
        "dinov2",
        description=(
            "What settings are that are left out. dino: class tokens, running centre and sharpening; ibot: masked "
            "patches too, one shared head; dinov2: the defaults that are listed here."
        ),
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="How several processes share the model. ddp: each has all of it; fsdp: each has a part."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of activations; weights, optimiser and losses stay float32."
    )
    compile: bool = Field(False, description="Compile the blocks with torch.compile; needs a C++ compiler.")
    activation_checkpointing: bool = Field(
        False, description="Run each block again for its gradient instead of keeping what it made: less memory."
    )
    start: StartConfig | None = Field(None, description="Begin with these weights; null: random ones.")
    distillation: DistillationConfig | None = Field(None, description="Learn from a frozen teacher; null: from itself.")
    ray: RayConfig = Field(default_factory=RayConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    crops: CropsConfig = Field(default_factory=CropsConfig)
    heads: HeadsConfig = Field(default_factory=HeadsConfig)
    losses: LossesConfig = Field(default_factory=LossesConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    images: ImagesConfig = Field(default_factory=ImagesConfig)
    monitors: MonitorsConfig = Field(default_factory=MonitorsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _fill_in_preset(self) -> Self:
        for section, values in PRESETS[self.preset].items():
            object.__setattr__(self, section, _with_defaults(getattr(self, section), values))
        return self

    @model_validator(mode="after")
    def _patches_to_learn_from(self) -> Self:
        losses = self.losses
        if self.distillation is not None:
            if losses.masked_share or self.model.drop_path:
                raise ValueError(
                    "distillation shows the student whole images and runs all of it: set losses.masked_share and "
                    "model.drop_path to 0"
                )
        elif losses.ibot_weight and not losses.masked_share:
            raise ValueError(
                "losses.ibot_weight needs masks: set losses.masked_share above 0, or losses.ibot_weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _heads_warm_up_within_the_run(self) -> Self:
        if self.start is not None and self.start.head_warmup_steps > self.schedule.steps:
            raise ValueError(
                f"start.head_warmup_steps {self.start.head_warmup_steps} is more than schedule.steps "
                f"{self.schedule.steps}"
            )
        return self

    @model_validator(mode="after")
    def _channels_are_there(self) -> Self:
        channels, crops = self.model.channels, self.crops
        if channels not in (1, 3):
            raise ValueError(
                f"model.channels {channels}: a manifest's images are RGB, of which training makes 3 channels, or 1 "
                "(grey); the model and its exports take any number, but more of them cannot be read from a manifest"
            )
        if not len(crops.mean) == len(crops.std) == channels:
            raise ValueError(f"crops.mean and crops.std must have a number for each of model.channels {channels}")
        return self

    @model_validator(mode="after")
    def _every_head_learns(self) -> Self:
        if self.heads.ibot is not None and not self.losses.ibot_weight:
            raise ValueError("heads.ibot learns nothing while losses.ibot_weight is 0; leave it out")
        return self

    @model_validator(mode="after")
    def _crops_are_whole_patches(self) -> Self:
        for name in ("global_px", "local_px") if self.crops.num_local else ("global_px",):
            side_px = getattr(self.crops, name)
            if side_px % self.model.patch_px:
                raise ValueError(f"crops.{name} {side_px} must be a multiple of model.patch_px {self.model.patch_px}")
        return self


def _with_defaults(section: Settings, values: Mapping[str, Any]) -> Settings:
    """Return a section with values for what was left out, checked again."""
    fields = dict(section)
    for name, value in values.items():
        if isinstance(value, Mapping):
            fields[name] = _with_defaults(fields[name], value)
        elif name not in section.model_fields_set:
            fields[name] = value
    return type(section)(**fields)
