"""Settings of an evaluation: ``curate evaluate --set linear.epochs=20``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.config.images import ImagesConfig
from curation.settings import Settings

RAW_SIDE_PX = 32

Task = Literal["knn", "linear", "logistic", "spectrum", "pictures"]


class LabelledConfig(Settings):
    """Images with a class each, some to learn from and some to test on."""

    path: str = Field(
        min_length=1,
        description="Parquet (file, folder or glob), or a folder with train/ and test/, with a folder for each class.",
    )
    test_path: str | None = Field(None, description="The images to test on, where they are not below path; same kind.")
    image_column: str = Field("image", description="Parquet: bytes, or {bytes, path} as Hugging Face writes it.")
    label_column: str = Field("label", description="Parquet: text or whole numbers.")
    split_column: str = Field("split", description="Parquet: says which rows are which, where there is no test_path.")
    train_split: str = Field("train", description="Value of split_column, or folder, to learn from.")
    test_split: str = Field("test", description="Value of split_column, or folder, to test on.")
    max_train: int | None = Field(None, ge=2, description="At most so many images, drawn by the seed; null: all.")
    max_test: int | None = Field(None, ge=1, description="At most so many images, drawn by the seed; null: all.")


class KnnConfig(Settings):
    """The weighted k-nearest-neighbour classifier."""

    k: tuple[int, ...] = Field((10, 20, 100, 200), min_length=1, description="Neighbours that vote.")
    temperature: float = Field(0.07, gt=0, description="A neighbour of cosine s counts exp(s / temperature).")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.k) < 1:
            raise ValueError("k must be at least 1")
        return self


class LinearConfig(Settings):
    """The linear probe: every combination is a head of its own, and all are trained side by side."""

    learning_rates: tuple[float, ...] = Field(
        (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
        min_length=1,
        description="At a batch of 256; scaled by batch size / 256.",
    )
    blocks: tuple[int, ...] = Field((1, 4), min_length=1, description="Class tokens of so many last blocks.")
    pooled: tuple[bool, ...] = Field(
        (False, True), min_length=1, description="Without and with the mean of the last block's patches."
    )
    epochs: int = Field(10, ge=1, le=10_000)
    batch_size: int = Field(128, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    holdout: float = Field(0.1, gt=0, lt=1, description="Share of the training images that the best head is chosen by.")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.learning_rates) <= 0 or min(self.blocks) < 1:
            raise ValueError("learning_rates and blocks must be positive")
        return self


class LogisticConfig(Settings):
    """Logistic regression on unit class tokens, the strength of its penalty chosen on held-out images."""

    powers: tuple[float, ...] = Field(
        tuple(float(power) for power in range(-6, 6)),
        min_length=1,
        description="C = 10 ** power; every fourth of the 45 published ones.",
    )
    max_iterations: int = Field(100, ge=1, description="Of L-BFGS for each C, which starts from the solution before.")
    holdout: float = Field(0.1, gt=0, lt=1, description="Share of the training images that C is chosen by.")


class PicturesConfig(Settings):
    """Attention maps and principal components of patches, as PNG."""

    num_images: int = Field(8, ge=1, le=256)
    side_px: int | None = Field(None, ge=8, le=4096, description="Shown to the backbone; null: as for the figures.")
    cell_px: int = Field(224, ge=8, le=2048, description="Side of each picture in the PNG.")


class EvaluateConfig(Settings):
    """An evaluation of frozen features."""

    seed: int = Field(0, ge=0, lt=2**63, description="Of samples, held-out images, probes and random weights.")
    data: LabelledConfig
    tasks: tuple[Task, ...] = Field(("knn", "linear", "logistic", "spectrum", "pictures"), min_length=1)
    side_px: int | None = Field(None, ge=8, le=4096, description="Side that the backbone sees; null: its own.")
    crop_share: float = Field(
        0.875, gt=0, le=1, description="Side of the central square / short side; 1 for images that are small already."
    )
    raw_side_px: int = Field(
        RAW_SIDE_PX, ge=1, le=256, description="Side of the images whose pixels are the raw features."
    )
    batch_size: int = Field(64, ge=1, description="Images per forward pass; fewer of more than 518 pixels.")
    workers: int = Field(2, ge=1, le=256, description="Threads that decode; no effect on results.")
    images: ImagesConfig = Field(default_factory=ImagesConfig)
    knn: KnnConfig = Field(default_factory=KnnConfig)
    linear: LinearConfig = Field(default_factory=LinearConfig)
    logistic: LogisticConfig = Field(default_factory=LogisticConfig)
    pictures: PicturesConfig = Field(default_factory=PicturesConfig)

    @property
    def needs_labels(self) -> bool:
        """Return whether a task compares with classes."""
        return bool({"knn", "linear", "logistic"} & set(self.tasks))
