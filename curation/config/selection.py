"""How what is left is embedded, searched, clustered and selected."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from curation import encoder_presets
from curation.settings import Settings


class EmbedConfig(Settings):
    """Settings of the ``embed`` stage."""

    preset: str | None = Field(None, description="A name of docs/embed.md; gives model, weights, features and side_px.")
    model: str = Field(
        "tf_efficientnet_lite0", description="A timm model name, hf-hub:organisation/name, or curation-dinov2."
    )
    weights: str = Field("efficientnet-lite0", description="A name of `curate models list`, a path, or hub.")
    side_px: int | None = Field(None, ge=32, le=2048, description="Input side; null: the model's own.")
    features: Literal["default", "cls", "pooled", "both"] = Field(
        "default",
        description=(
            "cls: class token; pooled: mean of patches or pixels; both: one after the other, equal in weight; default: "
            "what the model puts before its classifier."
        ),
    )
    batch_size: int = Field(16, ge=1, le=4096, description="Images per forward pass.")
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="Of weights and activations.")
    channels_last: bool = Field(True, description="Memory format of activations and convolutions.")
    compile: bool = Field(False, description="torch.compile; a minute at the start of each worker.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        return encoder_presets.filled_in(tree) if isinstance(tree, Mapping) else tree


class IndexConfig(Settings):
    """Settings of the ``index`` stage."""

    kind: Literal["auto", "flat", "ivf_pq"] = Field(
        "auto",
        description=(
            "flat: exact search; ivf_pq: inverted lists of product codes, re-ranked exactly; auto: flat while images x "
            "dimension < 2^25. What is null below comes from the table in docs/index.md."
        ),
    )
    num_lists: int | None = Field(None, ge=1, le=1 << 20, description="Inverted lists (ivf_pq).")
    code_bytes: int | None = Field(None, ge=1, le=1024, description="Bytes of a vector's code (ivf_pq).")
    probes: int | None = Field(None, ge=1, description="Lists that a search scans; null: as `recall` takes (ivf_pq).")
    depth: int | None = Field(
        None, ge=4, le=1 << 16, description="Candidates that are ranked exactly; null: as `recall` takes (ivf_pq)."
    )
    recall: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Share of the 4 nearest images that a search must find, on a sample of each seed set (ivf_pq).",
    )

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Self:
        given = [name for name in ("num_lists", "code_bytes", "probes", "depth") if getattr(self, name) is not None]
        if self.kind == "flat" and given:
            raise ValueError(f"{', '.join(given)}: a flat index has none; set kind to ivf_pq")
        return self


class ClusterConfig(Settings):
    """Settings of the ``cluster`` stage."""

    num_clusters: int = Field(1_000, ge=1, description="k of k-means; at most the number of images is used.")
    iterations: int = Field(20, ge=1, le=1000)
    sample_size: int | None = Field(
        1_000_000, ge=1, description="Images that the centroids are fitted on; null: all that are kept."
    )
    levels: tuple[Annotated[int, Field(ge=1)] | Literal["auto"], ...] = Field(
        (),
        description=(
            "Clusters of each level above the first, from the bottom, such as [10000, 1000] or [auto]: each level "
            "clusters the centroids of the one below. Balanced selection shares its images out from the top level "
            "down, so the top should have as many clusters as there are subjects, up to 1.2 times as many. auto, for "
            "the last level: as many as are left where the similarity of merged clusters falls most."
        ),
    )
    linkage: Literal["average", "kmeans"] = Field(
        "average",
        description=(
            "How levels above the first are made. average: by merging the most similar clusters, each counting once; "
            "levels of 10000 clusters or more by k-means. kmeans: all by k-means with resampling (arXiv 2405.15613), "
            "which gives common subjects more clusters."
        ),
    )
    resampling_rounds: int = Field(
        10, ge=0, description="How often the k-means of a level above the first is repeated on resampled centroids."
    )
    resampled_per_cluster: int | None = Field(
        None, ge=1, description="Nearest points of each cluster that a repetition sees; null: half of a mean cluster."
    )

    @model_validator(mode="after")
    def _shrinking(self) -> Self:
        if "auto" in self.levels[:-1] or ("auto" in self.levels and self.linkage == "kmeans"):
            raise ValueError("auto can only be the last of levels, with linkage average")
        sizes = [self.num_clusters, *(level for level in self.levels if level != "auto")]
        if any(above >= below for below, above in pairwise(sizes)):
            raise ValueError("levels must be smaller than num_clusters, and each smaller than the one before")
        return self


class RetrieveConfig(Settings):
    """Settings of the ``retrieve`` stage."""

    collisions: Literal["keep_nominal", "next_neighbour"] = Field(
        "keep_nominal",
        description=(
            "What happens when two seed images of a set retrieve the same pool image. keep_nominal: it counts twice; "
            "next_neighbour: the later one takes its next neighbour."
        ),
    )
    balanced_images: int | None = Field(
        None,
        ge=1,
        description=(
            "Pool images to select besides what seed sets retrieve, in equal shares for all clusters of the top level, "
            "and so on below; without seed sets nothing else is selected. Needs cluster.levels. null: none."
        ),
    )


class ExcludeConfig(Settings):
    """Images that must not be in a manifest: text files, one entry a line."""

    urls: tuple[str, ...] = Field((), description="Files of URLs.")
    domains: tuple[str, ...] = Field((), description="Files of domains; subdomains are included.")
    ids: tuple[str, ...] = Field((), description="Files of image ids.")


class ManifestConfig(Settings):
    """Settings of the ``manifest`` stage."""

    exclude: ExcludeConfig = Field(default_factory=ExcludeConfig)
