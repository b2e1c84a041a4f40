"""Settings of a training run: ``curation.settings.load(TrainConfig, "configs/dinov2/tiny.yaml")``."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from curation.config.images import ImagesConfig
from curation.dinov2.evaluate.config import LabelledConfig
from curation.settings import Settings


class Shape(NamedTuple):
    """Width, depth and attention heads of a vision transformer."""

    dim: int
    depth: int
    heads: int


SHAPES = {
    "tiny": Shape(192, 12, 3),
    "small": Shape(384, 12, 6),
    "base": Shape(768, 12, 12),
    "large": Shape(1024, 24, 16),
    "giant": Shape(1536, 40, 24),
}


class ModelConfig(Settings):
    """The vision transformer of student and teacher."""

    arch: Literal["tiny", "small", "base", "large", "giant"] = Field("small", description="Gives dim, depth and heads.")
    dim: int | None = Field(None, ge=8, le=8192, description="Features; null: those of arch.")
    depth: int | None = Field(None, ge=1, le=128, description="Blocks; null: those of arch.")
    heads: int | None = Field(None, ge=1, le=128, description="Attention heads; null: those of arch.")
    patch_px: int = Field(14, ge=1, le=64, description="Side of a patch.")
    channels: int = Field(
        3, ge=1, le=1024, description="Of the input. `curate train` has colour images (3), or makes them grey (1)."
    )
    ffn: Literal["mlp", "swiglu"] = Field("mlp", description="Feed-forward layer.")
    mlp_ratio: float = Field(4.0, gt=0, le=16, description="Hidden width of the feed-forward layer / dim.")
    registers: int = Field(0, ge=0, le=64, description="Register tokens.")
    layer_scale: float = Field(1e-5, gt=0, le=1, description="Initial scale of each residual branch.")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Share of rows that skip a residual branch.")
    pos_embed_antialias: bool = Field(True, description="Antialias resized position embeddings, as timm does.")
    pos_embed_offset: float = Field(
        0.0, ge=0, lt=1, description="Added to the target grid when resizing; 0.1 in the first published models."
    )

    @property
    def shape(self) -> Shape:
        """Return width, depth and heads: those given, else those of ``arch``."""
        given = SHAPES[self.arch]
        return Shape(self.dim or given.dim, self.depth or given.depth, self.heads or given.heads)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.shape.dim % self.shape.heads:
            raise ValueError(f"dim {self.shape.dim} must be a multiple of heads {self.shape.heads}")
        return self


class CropsConfig(Settings):
    """Views of an image and their augmentation."""

    global_px: int = Field(224, ge=8, le=2048, description="Side of the two global crops.")
    local_px: int = Field(98, ge=8, le=2048, description="Side of the local crops.")
    num_local: int = Field(8, ge=0, le=32, description="Local crops of each image.")
    global_scale: tuple[float, float] = Field((0.32, 1.0), description="Share of the image's area, from and to.")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="Share of the image's area, from and to.")
    aspect: tuple[float, float] = Field((0.75, 4 / 3), description="Width / height of a crop, from and to.")
    flip_p: float = Field(0.5, ge=0, le=1)
    jitter_p: float = Field(0.8, ge=0, le=1)
    brightness: float = Field(0.4, ge=0, lt=1, description="Factor within 1 ± this.")
    contrast: float = Field(0.4, ge=0, lt=1, description="Factor within 1 ± this.")
    saturation: float = Field(0.2, ge=0, lt=1, description="Factor within 1 ± this.")
    hue: float = Field(0.1, ge=0, le=0.5, description="Turn of the hue circle within ± this.")
    grey_p: float = Field(0.2, ge=0, le=1)
    blur_p: tuple[float, float, float] = Field(
        (1.0, 0.1, 0.5), description="First global, second global, local. The published code in effect has 0, 0.9, 0.5."
    )
    blur_sigma_px: tuple[float, float] = Field((0.1, 2.0), description="Of the 9-tap blur, from and to.")
    solarise_p: float = Field(0.2, ge=0, le=1, description="Second global crop only.")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="Of each of model.channels, from 0 to 1.")
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), description="Of each of model.channels.")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("global_scale", "local_scale", "aspect", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must rise from a number above 0, got {low} to {high}")
        for name in ("global_scale", "local_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name} must end at 1 or below")
        if not all(0 <= p <= 1 for p in self.blur_p):
            raise ValueError("blur_p must be probabilities")
        if not all(s > 0 for s in self.std):
            raise ValueError("std must be positive")
        return self


class HeadConfig(Settings):
    """A projection head: linear layers, a bottleneck of unit length, prototypes."""

    prototypes: int = Field(65_536, ge=2, le=1_048_576, description="Outputs K.")
    layers: int = Field(3, ge=1, le=8, description="Linear layers before the prototypes.")
    hidden_dim: int = Field(2048, ge=1, le=65_536)
    bottleneck_dim: int = Field(256, ge=1, le=8192)


class HeadsConfig(Settings):
    """The heads of student and teacher."""

    dino: HeadConfig = Field(default_factory=HeadConfig, description="On class tokens.")
    ibot: HeadConfig | None = Field(None, description="On masked patches; null: both share the one on class tokens.")


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


class ManifestConfig(Settings):
    """One of several manifests that are mixed."""

    path: str = Field(min_length=1, description="Path or URL of a manifest.")
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Its share of the samples, relative to the others'; null: its number of images.",
    )


class DataConfig(Settings):
    """Reading the manifest's images."""

    manifests: list[ManifestConfig] = Field(
        [], max_length=1000, description="Manifests that are mixed, where none is given otherwise."
    )
    batch_size: int = Field(64, ge=2, description="Images a step, over all processes and micro-batches.")
    micro_batches: int = Field(
        1,
        ge=1,
        le=4096,
        description="Parts that each process works through one after the other; same losses, less memory.",
    )
    reading: Literal["ranged", "streaming"] = Field(
        "ranged",
        description=(
            "ranged: a read for each image, in a random order of all; streaming: long reads of neighbours, which are "
            "mixed in a window. For stores where requests are slow."
        ),
    )
    chunk_images: int = Field(256, ge=1, le=100_000, description="Neighbours that are streamed together.")
    window_chunks: int = Field(
        16, ge=1, le=10_000, description="Chunks that are mixed; twice as many are in memory for each lane."
    )
    lanes: int = Field(
        1,
        ge=1,
        le=4096,
        description="Sequences streamed side by side; with a multiple of the processes none reads for another.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description=(
            "Processes that decode and crop ahead; no effect on results. 0: none. Null: none on a CPU, on a GPU its "
            "share of the machine's cores, at most 16."
        ),
    )
    prefetch_batches: int = Field(2, ge=1, le=64, description="Batches decoded ahead when there are workers.")
    max_replacements: int = Field(16, ge=0, description="Unreadable images in a row before the run stops.")
    max_image_bytes: int = Field(100_000_000, ge=1, description="Larger stored images count as unreadable.")
    reduced_decode: bool = Field(
        True, description="Decode a JPEG at 1/2, 1/4 or 1/8 where every crop still has at least its own side in pixels."
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if len({entry.weight is None for entry in self.manifests}) > 1:
            raise ValueError("manifests must all have a weight or none")
        if self.batch_size % self.lanes:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of lanes {self.lanes}")
        return self


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
        for name in ("global_px", "local_px"):
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
