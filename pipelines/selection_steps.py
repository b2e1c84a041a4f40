"""The steps that embed what is left, and search, cluster and select it."""

from typing import Any

from curation import schema
from curation.pipelines.context import Context
from curation.pipelines.dedup_steps import UNIQUE
from curation.pipelines.encoder import check_encoder, encoder, encoder_settings, encoder_weights
from curation.pipelines.plan import Step
from curation.pipelines.step_settings import limits, plain
from curation.stages.cluster import ClusterFit, ClusterStage
from curation.stages.cluster_summary import ClusterBaseline, ClusterSummary
from curation.stages.index import IndexFit, IndexStage
from curation.stages.retrieve import RetrieveStage

_POOL = ("pool",)
_OURS = ("pool", "seeds")


def select() -> tuple[Step, ...]:
    """Return the steps of ``embed``, ``index``, ``cluster`` and ``retrieve``."""
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
            settings=lambda config, _: {"embed": encoder_settings(config), "images": limits(config)},
            weights=encoder_weights,
            check=check_encoder,
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
                "embed": encoder_settings(config),
            },
            weights=encoder_weights,
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
                "embed": encoder_settings(config),
            },
            weights=encoder_weights,
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
    )


def _embed(context: Context) -> Any:
    from curation.stages.embed import EmbedStage

    return EmbedStage(encoder(context, "embed"), context.config.embed)


def _index(context: Context) -> IndexStage:
    return IndexStage(context.config.index, context.config.seed, num_threads=context.num_threads("index"))
