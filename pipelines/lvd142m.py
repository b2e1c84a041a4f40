"""The plan of LVD-142M: every stage, its steps, and what shapes their output."""

import hashlib
import json
from typing import Any

from curation import __version__, schema
from curation.config import RunConfig
from curation.config.selection import EmbedConfig
from curation.crawl.blocked import blocked_images
from curation.crawl.policy import UrlPolicy, policy_settings
from curation.crawl.robots import product_token
from curation.encoder_presets import HUB
from curation.errors import ConfigError, InputError
from curation.models.weights import HF_PREFIX, TIMM_PREFIX
from curation.pipelines.context import Context
from curation.pipelines.dedup_steps import UNIQUE, deduplicate
from curation.pipelines.faces_stage import faces_stage
from curation.pipelines.freshness import assess, collections
from curation.pipelines.ingest import inputs_of
from curation.pipelines.plan import Plan, Step
from curation.pipelines.step_settings import limits, plain
from curation.stages.cluster import ClusterFit, ClusterStage
from curation.stages.cluster_summary import ClusterBaseline, ClusterSummary
from curation.stages.index import IndexFit, IndexStage
from curation.stages.manifest import ManifestStage
from curation.stages.pca_hash_fit import PCA_FILE, PcaHashFit
from curation.stages.pca_hash_groups import PcaHashGroups
from curation.stages.retrieve import RetrieveStage
from curation.stages.verdicts import FacesVerdict, NsfwVerdict

_ALL = ("pool", "seeds", "references")
_POOL = ("pool",)
_OURS = ("pool", "seeds")
_FETCHED = (schema.FETCH,)
_RETRIEVED = (*UNIQUE, schema.RETRIEVE)


def build_plan(config: RunConfig) -> Plan:
    """Return the plan of a run.

    Raises:
        PlanError: If a step reads what no earlier step writes.
    """
    plan = Plan((*_bring_in(), *_hash(), *_screen(), *deduplicate(), *_select()))
    _check_resources(config, plan)
    return plan


def _bring_in() -> tuple[Step, ...]:
    return (
        Step(
            "crawl",
            "crawl",
            "crawl",
            3,
            _ALL,
            _nothing,
            writes=schema.CRAWL,
            protected=True,
            settings=lambda config, collection: {
                "inputs": [plain(entry) for entry in inputs_of(config, collection)],
                "shards": plain(config.shards),
                "crawl": plain(
                    config.crawl, "max_download_bytes", "input_attempts", "input_backoff_s", "input_timeout_s"
                ),
                "agent": product_token(config.fetch.user_agent),  # pages may address it
            },
        ),
        Step(
            "fetch",
            "fetch",
            "fetch",
            3,
            _ALL,
            _nothing,
            reads=(schema.CRAWL,),
            writes=schema.FETCH,
            protected=True,
            settings=lambda config, collection: {
                "images": limits(config),
                "max_bytes": config.fetch.max_bytes,
                "max_redirects": config.fetch.max_redirects,
                "resize": config.fetch.resize and plain(config.fetch.resize),
                "consent": plain(config.fetch.consent),
                "policy": policy_settings(config.fetch.policy),
                "allow_private_addresses": config.fetch.allow_private_addresses,
            },
            told=lambda config: {"consent": json.dumps(plain(config.fetch.consent), sort_keys=True)},
            check=_check_fetch,
        ),
    )


def _hash() -> tuple[Step, ...]:
    return (
        Step(
            "pca_hash_fit",
            "pca_hash",
            "reduce",
            PcaHashFit.version,
            _POOL,
            _pca_hash_fit,
            reads=PcaHashFit.reads,
            after=_FETCHED,
            makes=(PCA_FILE,),
            fitted=True,
            reads_raw=True,
            settings=lambda config, _: {
                "pca_hash": plain(config.pca_hash, "hamming_radius"),
                "seed": config.seed,
                **_hash_features(config),
            },
            weights=_hash_weights,
            check=lambda config: _check_encoder(config) if config.pca_hash.features == "model" else None,
        ),
        Step(
            "pca_hash",
            "pca_hash",
            "images",
            3,
            _POOL,
            _pca_hash,
            reads=_FETCHED,
            after=_FETCHED,
            writes=schema.PCA_HASH,
            needs=("pca_hash_fit",),
            shares_pass=("nsfw", "faces"),
            reads_raw=True,
            settings=lambda config, _: {
                "method": config.pca_hash.method,
                "side_px": config.pca_hash.side_px,
                "images": limits(config),
                **_hash_features(config),
            },
            weights=_hash_weights,
        ),
        Step(
            "pca_hash_verdict",
            "pca_hash",
            "reduce",
            PcaHashGroups.version,
            _OURS,
            lambda context: PcaHashGroups(hamming_radius=context.config.pca_hash.hamming_radius),
            reads=PcaHashGroups.reads,
            after=_FETCHED,
            writes=schema.PCA_HASH_VERDICT,
            settings=lambda config, _: {"hamming_radius": config.pca_hash.hamming_radius},
        ),
    )


def _screen() -> tuple[Step, ...]:
    return (
        Step(
            "nsfw",
            "nsfw",
            "images",
            2,
            _OURS,
            _nsfw,
            reads=_FETCHED,
            after=_FETCHED,
            writes=schema.NSFW,
            shares_pass=("faces",),
            reads_raw=True,
            settings=lambda config, _: {"images": limits(config)},
            weights=lambda config: (config.nsfw.weights,),
        ),
        Step(
            "nsfw_verdict",
            "nsfw",
            "map",
            NsfwVerdict.version,
            _OURS,
            lambda context: NsfwVerdict(context.config.nsfw),
            reads=NsfwVerdict.reads,
            after=_FETCHED,
            writes=schema.NSFW_VERDICT,
            settings=lambda config, _: {"max_score": config.nsfw.max_score},
        ),
        Step(
            "faces",
            "faces",
            "images",
            4,
            _OURS,
            faces_stage,
            reads=_FETCHED,
            after=(schema.FETCH, schema.NSFW_VERDICT),
            writes=schema.FACES,
            gate="nsfw_verdict",
            reads_raw=True,
            protected=True,
            settings=lambda config, _: {
                "faces": plain(config.faces),
                "images": limits(config),
            },
            weights=lambda config: (config.faces.weights,),
        ),
        Step(
            "faces_verdict",
            "faces",
            "map",
            FacesVerdict.version,
            _OURS,
            lambda context: FacesVerdict(),
            reads=FacesVerdict.reads,
            after=(schema.FETCH, schema.NSFW_VERDICT),
            writes=schema.FACES_VERDICT,
        ),
    )


def _select() -> tuple[Step, ...]:
    return (
        Step(
            "embed",
            "embed",
            "images",
            3,
            _OURS,
            _embed,
            reads=(schema.FETCH, schema.FACES),
            after=UNIQUE,
            writes=schema.EMBED,
            settings=lambda config, _: {"embed": _encoder_settings(config), "images": limits(config)},
            weights=_encoder_weights,
            check=_check_encoder,
        ),
        Step(
            "index_fit",
            "index",
            "reduce",
            IndexFit.version,
            _POOL,
            lambda context: IndexFit(context.config.index, context.config.seed, context.num_threads("index")),
            reads=IndexFit.reads,
            after=UNIQUE,
            makes=IndexFit.artefacts,
            fitted=True,
            settings=lambda config, _: {
                "index": plain(config.index, "probes", "depth", "recall"),
                "seed": config.seed,
                "embed": _encoder_settings(config),
            },
            weights=_encoder_weights,
        ),
        Step(
            "index",
            "index",
            "reduce",
            IndexStage.version,
            _POOL,
            _index,
            reads=IndexStage.reads,
            after=UNIQUE,
            needs=("index_fit",),
            makes=IndexStage.artefacts,
            settings=lambda config, _: {"index": plain(config.index), "seed": config.seed},
        ),
        Step(
            "cluster_fit",
            "cluster",
            "reduce",
            ClusterFit.version,
            _POOL,
            lambda context: ClusterFit(context.config.cluster, context.config.seed, context.num_threads("cluster")),
            reads=ClusterFit.reads,
            after=UNIQUE,
            makes=ClusterFit.artefacts,
            fitted=True,
            in_rounds=True,
            settings=lambda config, _: {
                "cluster": plain(config.cluster),
                "seed": config.seed,
                "embed": _encoder_settings(config),
            },
            weights=_encoder_weights,
        ),
        Step(
            "cluster",
            "cluster",
            "map",
            ClusterStage.version,
            _OURS,
            lambda context: ClusterStage(context.artefacts("cluster_fit")),
            reads=ClusterStage.reads,
            after=UNIQUE,
            writes=schema.CLUSTER,
            needs=("cluster_fit",),
        ),
        Step(
            "cluster_baseline",
            "cluster",
            "reduce",
            ClusterBaseline.version,
            _POOL,
            lambda context: ClusterBaseline(context.config.seed),
            reads=ClusterBaseline.reads,
            after=UNIQUE,
            makes=ClusterBaseline.artefacts,
            needs=("cluster_fit",),
            fitted=True,
            settings=lambda config, _: {"seed": config.seed},
        ),
        Step(
            "cluster_summary",
            "cluster",
            "reduce",
            ClusterSummary.version,
            _OURS,
            lambda context: ClusterSummary(context.config.seed),
            reads=ClusterSummary.reads,
            after=UNIQUE,
            makes=ClusterSummary.artefacts,
            needs=("cluster_baseline",),
            settings=lambda config, _: {"seed": config.seed},
        ),
        Step(
            "retrieve",
            "retrieve",
            "reduce",
            RetrieveStage.version,
            _OURS,
            lambda context: RetrieveStage(context.config, context.num_threads("retrieve")),
            reads=RetrieveStage.reads,
            after=UNIQUE,
            writes=schema.RETRIEVE,
            writes_for=_POOL,
            needs=("index", "cluster_fit"),
            settings=lambda config, _: {
                "seed": config.seed,
                "retrieve": plain(config.retrieve),
                "index": {name: getattr(config.index, name) for name in ("recall", "probes", "depth")},
                "seeds": {name: plain(seeds, "inputs", "as_is") for name, seeds in config.seeds.items()},
            },
        ),
        Step(
            "manifest_verdict",
            "manifest",
            "reduce",
            ManifestStage.version,
            _OURS,
            _manifest,
            reads=ManifestStage.reads,
            after=_RETRIEVED,
            writes=schema.MANIFEST_VERDICT,
            makes=ManifestStage.artefacts,
            locations=True,
            settings=lambda config, _: {
                "exclude": {name: _list_digests(paths) for name, paths in config.manifest.exclude},
                "as_is": sorted(name for name, seeds in config.seeds.items() if seeds.as_is),
                **_blocked(config),
            },
        ),
    )


def _nothing(context: Context) -> None:
    return None


def _pca_hash_fit(context: Context) -> PcaHashFit:
    config = context.config
    return PcaHashFit(config.pca_hash, config.images, config.seed, _hash_encoder(context))


def _pca_hash(context: Context) -> Any:
    from curation.stages.pca_hash import PcaHash, PcaHashStage

    pca = PcaHash.load(context.artefacts("pca_hash_fit") / PCA_FILE)
    return PcaHashStage(pca, context.config.pca_hash, context.config.images, _hash_encoder(context))


def _hash_encoder(context: Context) -> Any:
    """Return the encoder whose features are hashed, if a model's are."""
    return _encoder(context, "pca_hash") if context.config.pca_hash.features == "model" else None


def _hash_features(config: RunConfig) -> dict[str, Any]:
    if config.pca_hash.features == "pixels":
        return {"features": "pixels"}
    return {"features": "model", "embed": _encoder_settings(config)}


def _hash_weights(config: RunConfig) -> tuple[str, ...]:
    return _encoder_weights(config) if config.pca_hash.features == "model" else ()


def _nsfw(context: Context) -> Any:
    from curation.models.nsfw import NsfwScorer
    from curation.stages.nsfw import NsfwStage

    config = context.config.nsfw
    scorer = NsfwScorer(context.weights(config.weights), config.batch_size, device=context.device("nsfw"))
    return NsfwStage(scorer, config)


def _embed(context: Context) -> Any:
    from curation.stages.embed import EmbedStage

    return EmbedStage(_encoder(context, "embed"), context.config.embed)


def _encoder(context: Context, stage: str) -> Any:
    from curation.models.encoder import ImageEncoder  # takes torch and timm

    (weights,) = _encoder_weights(context.config)
    return ImageEncoder(context.config.embed, context.weights(weights), device=context.device(stage))


def _index(context: Context) -> IndexStage:
    return IndexStage(context.config.index, context.config.seed, num_threads=context.num_threads("index"))


def _check_fetch(config: RunConfig) -> None:
    """Refuse lists that cannot be read, before a request is sent; workers find those of domains sorted in the cache."""
    blocked_images(config.fetch, config.images)
    UrlPolicy.load(config.fetch.policy)


def _check_encoder(config: RunConfig) -> None:
    """Refuse an encoder that cannot work; the default one can, and timm takes seconds to import."""
    default = EmbedConfig()
    if (config.embed.model, config.embed.features, config.embed.side_px) != (default.model, default.features, None):
        from curation.models import networks  # takes torch and timm

        networks.check(config.embed)


def _manifest(context: Context) -> ManifestStage:
    plan = build_plan(context.config)
    verdicts = {
        kind: [
            (step.stage, step.writes)
            for step in plan.verdicts(kind)
            if step.writes is not None and step.name != ManifestStage.name
        ]
        for kind in _OURS
    }
    names = dict.fromkeys(name for step in plan.steps for name in step.weights(context.config))
    weights = {
        name: {"sha256": found.sha256, "license": found.license}
        for name, found in ((name, context.weights(name)) for name in names)
    }
    provenance = {
        "version": __version__,
        "weights": weights,
        "accept_licenses": list(context.config.accept_licenses),
        "consent": {**_consent(context, plan), "user_agent": context.config.fetch.user_agent},
        "config": context.config.model_dump(mode="json"),
        "made_with_other_settings": _kept_stale(context, plan),
    }
    return ManifestStage(context.config, verdicts, provenance)


def _consent(context: Context, plan: Plan) -> dict[str, bool]:
    """Return which checks of ``fetch.consent`` are on, and were whenever an image was fetched."""
    found = [plain(context.config.fetch.consent)]
    for collection in collections(context, plan.step("fetch")):
        markers = context.run.markers(collection, "fetch").values()
        texts = {marker.inputs["setting consent"] for marker in markers if "setting consent" in marker.inputs}
        found += [json.loads(text) for text in sorted(texts)]
    return {name: all(checks.get(name, True) for checks in found) for name in found[0]}


def _kept_stale(context: Context, plan: Plan) -> dict[str, list[str]]:
    """Return the steps that were kept although they were made with other settings, and what differs."""
    stale: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.name != ManifestStage.name and (step.protected or step.reads_raw):
            changed = {
                name for found in assess(context, plan, step) if found.state == "stale" for name in found.changed
            }
            if changed:
                stale[step.name] = sorted(changed)
    return stale


def _encoder_weights(config: RunConfig) -> tuple[str, ...]:
    """Return the name of the encoder's weights; those of the hub are named after the model."""
    model, weights = config.embed.model, config.embed.weights
    if weights != HUB:
        return (weights,)
    return (model if model.startswith(HF_PREFIX) else f"{TIMM_PREFIX}{model}",)


def _encoder_settings(config: RunConfig) -> dict[str, Any]:
    return plain(config.embed, "preset", "weights")  # weights count by their digest


def _blocked(config: RunConfig) -> dict[str, Any]:
    """Return what lists of images say: those that came to be listed once they were fetched are in no manifest."""
    paths = config.fetch.blocked_hashes
    return {"blocked_hashes": _list_digests(paths, "fetch.blocked_hashes")} if paths else {}


def _list_digests(paths: Any, setting: str = "manifest.exclude") -> list[str]:
    """Return the digests of exclusion lists: what they say shapes the manifest, not where they lie."""
    digests = []
    for path in paths:
        try:
            with open(path, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    return digests


def _check_resources(config: RunConfig, plan: Plan) -> None:
    unknown = sorted(set(config.resources) - set(plan.stages) - {"default"})
    if unknown:
        raise ConfigError(
            [f"resources.{name}: is no stage; stages: default, {', '.join(plan.stages)}" for name in unknown]
        )
