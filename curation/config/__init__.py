"""What can be set: a section for each stage, named like it, and the inputs of pool, seeds and references."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from curation.config.dedup import DedupConfig, SscdConfig
from curation.config.fetch import CrawlConfig, FetchConfig, PolicyConfig
from curation.config.images import FacesConfig, ImagesConfig, NsfwConfig, PcaHashConfig
from curation.config.inputs import InputConfig, PoolConfig, ReferenceConfig, SeedConfig
from curation.config.selection import ClusterConfig, EmbedConfig, IndexConfig, ManifestConfig, RetrieveConfig
from curation.settings import Settings

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class ShardsConfig(Settings):
    """How rows are cut into shards."""

    rows: int = Field(10_000, ge=1, le=1_000_000, description="About this many rows a shard.")


class ResourceConfig(Settings):
    """What one step asks of a Ray cluster."""

    workers: int = Field(1, ge=1, description="Actors that work on shards of the step at a time.")
    cpus: float = Field(1, ge=0, description="CPUs of each actor.")
    gpus: float = Field(0, ge=0, description="GPUs of each actor.")


class RunConfig(Settings):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every sample that is drawn.")
    accept_licenses: tuple[str, ...] = Field(
        (), description="Licences of weights that are accepted, such as CC-BY-NC-4.0."
    )
    pool: PoolConfig = Field(default_factory=PoolConfig)
    seeds: dict[Name, SeedConfig] = Field(default_factory=dict)
    references: dict[Name, ReferenceConfig] = Field(default_factory=dict)
    shards: ShardsConfig = Field(default_factory=ShardsConfig)
    images: ImagesConfig = Field(default_factory=ImagesConfig)
    crawl: CrawlConfig = Field(default_factory=CrawlConfig)
    fetch: FetchConfig = Field(default_factory=FetchConfig)
    pca_hash: PcaHashConfig = Field(default_factory=PcaHashConfig)
    nsfw: NsfwConfig = Field(default_factory=NsfwConfig)
    faces: FacesConfig = Field(default_factory=FacesConfig)
    sscd: SscdConfig = Field(default_factory=SscdConfig)
    dedup: DedupConfig = Field(default_factory=DedupConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    index: IndexConfig = Field(default_factory=IndexConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    retrieve: RetrieveConfig = Field(default_factory=RetrieveConfig)
    manifest: ManifestConfig = Field(default_factory=ManifestConfig)
    resources: dict[str, ResourceConfig] = Field(
        default_factory=dict, description="Per stage; `default` for those not named."
    )

    @model_validator(mode="after")
    def _balanced_over_levels(self) -> Self:
        if self.retrieve.balanced_images is not None and not self.cluster.levels:
            raise ValueError(
                "retrieve.balanced_images needs cluster.levels: the clusters of k-means alone lie where images are "
                "many, so equal shares of them hardly balance; set cluster.levels, such as [auto]"
            )
        return self


def absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings with local paths made absolute: workers start in folders of their own.

    Args:
        config: Of a run.
        folder: That relative paths start from.
    """

    def anchored(path: str) -> str:
        return path if not path or "://" in path else str(folder / path)

    def with_paths(inputs: Sequence[InputConfig]) -> tuple[InputConfig, ...]:
        return tuple(
            entry.model_copy(update={"path": anchored(entry.path), "mirror": anchored(entry.mirror)})
            for entry in inputs
        )

    def collection(section: Any) -> Any:
        return section.model_copy(update={"inputs": with_paths(section.inputs)})

    update: dict[str, Any] = {
        "pool": collection(config.pool),
        "seeds": {name: collection(section) for name, section in config.seeds.items()},
        "references": {name: collection(section) for name, section in config.references.items()},
    }
    for name in ("nsfw", "faces", "sscd", "embed"):
        section = getattr(config, name)
        if Path(section.weights).suffix and (folder / section.weights).exists():
            update[name] = section.model_copy(update={"weights": anchored(section.weights)})
    policy = {name: tuple(map(anchored, getattr(config.fetch.policy, name))) for name in PolicyConfig.LISTS}
    update["fetch"] = config.fetch.model_copy(
        update={
            "policy": config.fetch.policy.model_copy(update=policy),
            "blocked_hashes": tuple(map(anchored, config.fetch.blocked_hashes)),
            "blocked_pdq": tuple(map(anchored, config.fetch.blocked_pdq)),
        }
    )
    lists = {kind: tuple(map(anchored, paths)) for kind, paths in config.manifest.exclude}
    exclude = config.manifest.exclude.model_copy(update=lists)
    update["manifest"] = config.manifest.model_copy(update={"exclude": exclude})
    return config.model_copy(update=update)
