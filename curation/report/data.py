"""What the page shows beyond the overview, as plain values."""

from dataclasses import dataclass

from curation.report.overview import Overview


@dataclass(frozen=True)
class WeightsUse:
    """Weights that shaped the run.

    Attributes:
        name: As in the settings.
        stages: Stages that use them.
        license: SPDX expression, or ``unknown``.
        sha256: Of the model's bytes; empty where it is not known.
    """

    name: str
    stages: tuple[str, ...]
    license: str
    sha256: str


@dataclass(frozen=True)
class SeedRow:
    """One seed set in one kind of use, as Table 15 of the DINOv2 paper lists them.

    Attributes:
        seed: Name of the set.
        kind: ``as is``, ``sample, k = 4`` or ``cluster``.
        num_images: Seed images that can be used.
        nominal: Images retrieved, one that several seed images retrieve counted each time; None where nothing is
            retrieved or retrieval is not finished.
        unique: Different images among them.
        final: Images in the manifest; one that several sets retrieve counts in each. None: not finished.
    """

    seed: str
    kind: str
    num_images: int
    nominal: int | None
    unique: int | None
    final: int | None


@dataclass(frozen=True)
class SizeBin:
    """Near-duplicate components of ``smallest`` to ``largest`` images."""

    smallest: int
    largest: int
    num_components: int
    num_images: int


@dataclass(frozen=True)
class Member:
    """One image of a component.

    Attributes:
        image_id: Its id.
        url: Where it was found.
        reason: Why it is not in the manifest, by the first verdict that rejects it; None if nothing does so far.
        copy_of: Image id of what it copies; None for a representative.
        similarity: Cosine with that image.
        thumbnail: A small JPEG made from the blurred image; None: nothing that may be shown is stored.
    """

    image_id: str
    url: str
    reason: str | None
    copy_of: str | None = None
    similarity: float | None = None
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Component:
    """A near-duplicate component.

    Attributes:
        component_id: Smallest image id in it.
        num_images: Its images.
        members: The representative, if one was kept, then those that are least like what they copy.
    """

    component_id: str
    num_images: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Components:
    """The near-duplicate components of the pool.

    Attributes:
        num_singles: Images that nothing copies.
        bins: Sizes of the others, in powers of two.
        largest: The largest, largest first.
    """

    num_singles: int
    bins: tuple[SizeBin, ...]
    largest: tuple[Component, ...]


@dataclass(frozen=True)
class Cluster:
    """A cluster of embeddings.

    Attributes:
        cluster_id: Its number.
        num_images: Images of the pool in it.
        seeds: Seed set and how many of its images are in it, largest first; sets without any are left out.
        nearest: Images nearest to the centroid, nearest first; ``similarity`` is that with the centroid.
        others: Some of the others, drawn by the run's seed.
    """

    cluster_id: int
    num_images: int
    seeds: tuple[tuple[str, int], ...]
    nearest: tuple[Member, ...]
    others: tuple[Member, ...]


@dataclass(frozen=True)
class Clusters:
    """The clusters of the pool.

    Attributes:
        num_clusters: Centroids.
        num_empty: Those without images of the pool.
        bins: Sizes of the others, in powers of two; components are clusters here.
        largest: The largest, largest first.
        drawn: Some of the others, drawn by the run's seed, by number.
    """

    num_clusters: int
    num_empty: int
    bins: tuple[SizeBin, ...]
    largest: tuple[Cluster, ...]
    drawn: tuple[Cluster, ...]


@dataclass(frozen=True)
class EmbeddingMap:
    """A picture of the embeddings' first two principal components.

    Attributes:
        png: The picture.
        collections: Name, number of dots and colour (``#rrggbb``) of each collection.
        explained: Share of the sample's variance along both axes, in [0, 1].
    """

    png: bytes
    collections: tuple[tuple[str, int, str], ...]
    explained: float


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        title: Name of the run.
        overview: How it stands.
        config: The resolved settings, as YAML.
        accept_licenses: Non-commercial licences that the user accepted.
        weights: Weights that shaped it.
        seeds: Seed sets; empty if there are none.
        components: Near-duplicates, or None before ``dedup`` is finished.
        threshold: Cosine above which two images are near-duplicates.
        clusters: Clusters, or None before ``cluster`` is finished.
        embedding_map: Embeddings as dots, or None before ``embed`` is finished.
    """

    title: str
    overview: Overview
    config: str
    accept_licenses: tuple[str, ...]
    weights: tuple[WeightsUse, ...]
    seeds: tuple[SeedRow, ...]
    components: Components | None
    threshold: float
    clusters: Clusters | None = None
    embedding_map: EmbeddingMap | None = None
