"""Settings of what is trained: a vision transformer and its heads."""

from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

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
