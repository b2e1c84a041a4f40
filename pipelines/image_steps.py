"""The steps that look at images as they were fetched: hashes, unsafe images, faces."""

from typing import Any

from curation import schema
from curation.config import RunConfig
from curation.pipelines.context import Context
from curation.pipelines.encoder import check_encoder, encoder, encoder_settings, encoder_weights
from curation.pipelines.faces_stage import faces_stage
from curation.pipelines.plan import Step
from curation.pipelines.step_settings import limits, plain
from curation.stages.pca_hash_fit import PCA_FILE, PcaHashFit
from curation.stages.pca_hash_groups import PcaHashGroups
from curation.stages.verdicts import FacesVerdict, NsfwVerdict

_POOL = ("pool",)
_OURS = ("pool", "seeds")
_FETCHED = (schema.FETCH,)


def hash_images() -> tuple[Step, ...]:
    """Return the steps of ``pca_hash``."""
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
            check=lambda config: check_encoder(config) if config.pca_hash.features == "model" else None,
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


def screen() -> tuple[Step, ...]:
    """Return the steps of ``nsfw`` and ``faces``."""
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


def _pca_hash_fit(context: Context) -> PcaHashFit:
    config = context.config
    return PcaHashFit(config.pca_hash, config.images, config.seed, _hash_encoder(context))


def _pca_hash(context: Context) -> Any:
    from curation.stages.pca_hash import PcaHash, PcaHashStage

    pca = PcaHash.load(context.artefacts("pca_hash_fit") / PCA_FILE)
    return PcaHashStage(pca, context.config.pca_hash, context.config.images, _hash_encoder(context))


def _hash_encoder(context: Context) -> Any:
    """Return the encoder whose features are hashed, if a model's are."""
    return encoder(context, "pca_hash") if context.config.pca_hash.features == "model" else None


def _hash_features(config: RunConfig) -> dict[str, Any]:
    if config.pca_hash.features == "pixels":
        return {"features": "pixels"}
    return {"features": "model", "embed": encoder_settings(config)}


def _hash_weights(config: RunConfig) -> tuple[str, ...]:
    return encoder_weights(config) if config.pca_hash.features == "model" else ()


def _nsfw(context: Context) -> Any:
    from curation.models.nsfw import NsfwScorer
    from curation.stages.nsfw import NsfwStage

    config = context.config.nsfw
    scorer = NsfwScorer(context.weights(config.weights), config.batch_size, device=context.device("nsfw"))
    return NsfwStage(scorer, config)
