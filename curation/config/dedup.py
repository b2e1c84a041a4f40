"""How copies are described and found."""

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.settings import Settings


class SscdConfig(Settings):
    """Settings of the ``sscd`` stage."""

    weights: str = Field("immaculate-sscd", description="A name of `curate models list`, or a path (.onnx, .pt).")
    side_px: int | None = Field(
        None,
        ge=64,
        le=1024,
        description="Images are squashed to this square; null: the file's own, 320 (.pt), 288 (.onnx).",
    )
    batch_size: int = Field(8, ge=1, le=4096, description="Images per forward pass; smaller batches are padded.")
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32",
        description="Of a TorchScript file, under autocast: fp16 and bf16 are for GPUs. ONNX files have their own.",
    )
    whitening: Literal["none", "fit"] = Field(
        "none",
        description=(
            "fit: descriptors are whitened by a PCA of a sample of the pool before they are normalised. Cosines get "
            "smaller, so dedup's thresholds have to be moved: see `curate calibrate dedup`."
        ),
    )
    score_norm: Literal["none", "fit"] = Field(
        "none",
        description=(
            "fit: store each image's mean similarity with its 3 nearest of a sample of the pool as `score_bias`, for "
            "retrieval scores of your own and `curate calibrate dedup`; dedup does not use it (docs/sscd.md)."
        ),
    )
    sample_size: int = Field(
        20_000, ge=1_024, le=200_000, description="Pool images that whitening and score_norm are fitted on."
    )


class DedupConfig(Settings):
    """Settings of the ``dedup`` stage.

    Cosines go up to 0.99: stored descriptors have unit length only up to the rounding of float16, so that even an image
    with itself may be below a threshold nearer to 1.
    """

    threshold: float = Field(0.6, gt=0, le=0.99, description="Cosine above which two pool images are copies.")
    reference_threshold: float = Field(0.45, gt=0, le=0.99, description="Above it an image copies a reference.")
    edge_floor: float = Field(
        0.5,
        gt=0,
        le=0.99,
        description="Pairs of the pool are kept down to it: `threshold` moves above it at no cost.",
    )
    reference_floor: float = Field(
        0.4, gt=0, le=0.99, description="The same for pairs with references and `reference_threshold`."
    )
    decontaminate: Literal["component", "neighbours"] = Field(
        "component",
        description=(
            "What goes when an image copies a reference. component: everything connected to it, as in the paper; "
            "neighbours: only the images that copy a reference themselves."
        ),
    )
    min_similarity_to_representative: float | None = Field(
        None,
        gt=0,
        le=0.99,
        description=(
            "Split components whose members are chained together, so that every member has this cosine with the image "
            "that represents it; null: components stay whole."
        ),
    )
    backend: Literal["auto", "exact", "inverted"] = Field(
        "auto", description="How pairs are searched. auto: exact up to exact_max_rows pool images, else inverted."
    )
    exact_max_rows: int = Field(200_000, ge=0, description="Pool images up to which auto compares all pairs.")
    recall: float = Field(
        0.99, gt=0, lt=1, description="Share of the pairs above the floor that the inverted search is fitted to find."
    )
    sample_size: int = Field(20_000, ge=1_000, description="Images that the inverted search is fitted on.")
    block_rows: int = Field(
        500_000, ge=1, description="Images on each side of a search task; two such groups are in memory at a time."
    )
    max_edges_per_row: int = Field(
        64, ge=1, description="A task with more pairs an image than this keeps a maximum spanning forest of them."
    )
    max_dropped_fraction: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Stop, with the audit, when references and seeds drop more of the pool than this.",
    )

    @model_validator(mode="after")
    def _floors_are_below_thresholds(self) -> Self:
        for name, floor_name in (("threshold", "edge_floor"), ("reference_threshold", "reference_floor")):
            value, floor = getattr(self, name), getattr(self, floor_name)
            if value < floor:
                raise ValueError(
                    f"{name} {value:g} is below {floor_name} {floor:g}, and pairs below it are not searched; lower "
                    f"{floor_name} too, which searches again"
                )
        return self
