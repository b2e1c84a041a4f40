"""Settings of what is seen: images of manifests, and views of them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.settings import Settings


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
