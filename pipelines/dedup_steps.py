"""The steps of copy detection: descriptors, the search for pairs in blocks, and what pairs say about images."""

from collections.abc import Callable
from typing import Any

from curation import schema
from curation.config import RunConfig
from curation.indexes.pairs import PairSearch
from curation.pipelines.context import Context
from curation.pipelines.faces_stage import faces_stage
from curation.pipelines.plan import Step
from curation.pipelines.step_settings import limits, plain
from curation.stages.dedup import DedupStage
from curation.stages.dedup_edges import DedupEdges
from curation.stages.dedup_search import DedupCodes, DedupFit, load_search
from curation.stages.sscd_fit import POSTPROCESS_FILE, SscdFit

STORED = (schema.FETCH, schema.PCA_HASH_VERDICT, schema.NSFW_VERDICT, schema.FACES_VERDICT)  # kept until here
UNIQUE = (*STORED, schema.DEDUP)  # and behind it
_ALL = ("pool", "seeds", "references")
_OURS = ("pool", "seeds")


def deduplicate() -> tuple[Step, ...]:
    """Return the steps of ``sscd`` and ``dedup``."""
    return (
        Step(
            "sscd_fit",
            "sscd",
            "reduce",
            SscdFit.version,
            ("pool",),
            lambda context: SscdFit(context.config.sscd, context.config.images, context.config.seed, _copies(context)),
            reads=SscdFit.reads,
            after=STORED,
            makes=(POSTPROCESS_FILE,),
            fitted=True,
            settings=lambda config, _: {
                "seed": config.seed,
                "sample_size": config.sscd.sample_size,
                **_sscd_settings(config),
            },
            weights=lambda config: (config.sscd.weights,),
        ),
        Step(
            "sscd",
            "sscd",
            "images",
            4,
            _ALL,
            _sscd,
            reads=(schema.FETCH, schema.FACES),
            after=STORED,
            writes=schema.SSCD,
            needs=("sscd_fit",),
            settings=lambda config, collection: {
                **_sscd_settings(config),
                **({"faces": plain(config.faces)} if collection.startswith("references/") else {}),
            },
            weights=lambda config: (config.sscd.weights, *([config.faces.weights] if config.references else [])),
        ),
        Step(
            "dedup_fit",
            "dedup",
            "reduce",
            DedupFit.version,
            ("pool",),
            lambda context: DedupFit(context.config.dedup, context.config.seed, context.num_threads("dedup")),
            reads=DedupFit.reads,
            after=STORED,
            makes=DedupFit.artefacts,
            fitted=True,
            settings=_fit_settings,
        ),
        Step(
            "dedup_codes",
            "dedup",
            "map",
            DedupCodes.version,
            _ALL,
            lambda context: DedupCodes(_search(context), context.num_threads("dedup")),
            reads=DedupCodes.reads,
            after=STORED,
            writes=schema.DEDUP_CODES,
            needs=(DedupFit.name,),
        ),
        Step(
            "dedup_edges",
            "dedup",
            "blocks",
            DedupEdges.version,
            _ALL,
            _edges,
            reads=DedupEdges.reads,
            needs=(DedupFit.name,),
            makes=("edges",),
            pairs=_pairs,
            settings=_edge_settings,
        ),
        Step(
            "dedup",
            "dedup",
            "reduce",
            DedupStage.version,
            _ALL,
            lambda context: DedupStage(context.config),
            reads=DedupStage.reads,
            after=STORED,
            writes=schema.DEDUP,
            writes_for=_OURS,
            needs=(DedupFit.name, DedupEdges.name),
            makes=DedupStage.artefacts,
            settings=lambda config, _: {
                "threshold": config.dedup.threshold,
                "reference_threshold": config.dedup.reference_threshold,
                "decontaminate": config.dedup.decontaminate,
                "min_similarity_to_representative": config.dedup.min_similarity_to_representative,
                "max_dropped_fraction": config.dedup.max_dropped_fraction,
                "as_is": sorted(name for name, seeds in config.seeds.items() if seeds.as_is),
            },
        ),
    )


def _pairs(context: Context) -> list[tuple[str, str]]:
    """Return what is compared: the pool with itself and with seeds that stay, and both with references."""
    pool, seeds, references = (context.collections(kind) for kind in _ALL)
    as_is = [name for name in seeds if context.config.seeds[name.partition("/")[2]].as_is]
    found = [(left, left) for left in pool]
    found += [(left, right) for left in pool for right in as_is]
    return found + [(left, right) for left in (*pool, *seeds) for right in references]


def _fit_settings(config: RunConfig, collection: str) -> dict[str, Any]:
    names = {"backend", "exact_max_rows", "recall", "sample_size", "edge_floor", "reference_floor", "block_rows"}
    if config.dedup.backend == "exact":  # there is nothing to fit
        names = {"backend"}
    return {"seed": config.seed, **config.dedup.model_dump(mode="json", include=names)}


def _edge_settings(config: RunConfig, right: str) -> dict[str, Any]:
    """Return what shapes the pairs of a block whose right side is of that collection."""
    kind = right.partition("/")[0]
    if kind == "references":
        return {"floor": config.dedup.reference_floor}
    if kind == "seeds":
        return {"floor": config.dedup.edge_floor}
    return {"floor": config.dedup.edge_floor, "max_edges_per_row": config.dedup.max_edges_per_row}


def _sscd(context: Context) -> Any:
    from curation.stages.sscd import SscdStage
    from curation.stages.sscd_postprocess import Postprocess

    encoder = _copies(context)()
    postprocess = Postprocess.load(context.artefacts("sscd_fit") / POSTPROCESS_FILE)
    return SscdStage(encoder, postprocess, faces_stage(context).blurred if context.config.references else None)


def _copies(context: Context) -> Callable[[], Any]:
    """Return what loads the copy-detection model."""

    def load() -> Any:
        from curation.models.sscd import SscdEncoder

        config = context.config.sscd
        return SscdEncoder(
            context.weights(config.weights),
            batch_size=config.batch_size,
            side_px=config.side_px,
            device=context.device("sscd"),
            precision=config.precision,
        )

    return load


def _sscd_settings(config: RunConfig) -> dict[str, Any]:
    return {"sscd": plain(config.sscd, "weights", "sample_size"), "images": limits(config)}


def _edges(context: Context) -> DedupEdges:
    return DedupEdges(context.config.dedup, _search(context), context.num_threads("dedup"))


def _search(context: Context) -> PairSearch:
    return load_search(context.artefacts(DedupFit.name))
