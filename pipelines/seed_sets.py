"""What each seed set brought, as Table 15 of the DINOv2 paper (arXiv 2304.07193) lists it."""

from collections import Counter

import numpy as np
import pyarrow as pa

from curation.config.inputs import SeedConfig
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan
from curation.pipelines.tallies import finished_verdicts, read_aligned, shard_rows
from curation.report.data import SeedRow
from curation.report.overview import CollectionOverview, Overview


def seed_rows(context: Context, plan: Plan, found: Overview) -> tuple[SeedRow, ...]:
    """Return one row for each seed set and kind of use."""
    collections = {collection.name: collection for collection in found.collections}
    retrieved = _retrieved(context, plan)
    searched = collections["pool"].entry("retrieve")
    rows = []
    for name, config in sorted(context.config.seeds.items()):
        seeds = collections[f"seeds/{name}"]
        num_images = _usable(seeds)
        if config.as_is:
            manifest = seeds.entry("manifest")
            rows.append(SeedRow(name, "as is", num_images, None, None, None if manifest is None else manifest.num_out))
        if config.retrieve == "none":
            continue
        kind = f"sample, k = {config.k}" if config.retrieve == "sample" else "cluster"
        if retrieved is None or searched is None:
            rows.append(SeedRow(name, kind, num_images, None, None, None))
            continue
        unique, final = (None if counts is None else counts[name] for counts in retrieved)
        nominal = unique
        if config.retrieve == "sample" and context.config.retrieve.collisions == "keep_nominal":
            nominal = _nominal(config, num_images, searched.num_in)
        rows.append(SeedRow(name, kind, num_images, nominal, unique, final))
    return tuple(rows)


def _nominal(config: SeedConfig, num_seeds: int, num_pool: int) -> int:
    """Return how many images are retrieved with collisions: tables keep their number a pool image, not a seed set."""
    return num_seeds * min(config.k, num_pool)


def _usable(seeds: CollectionOverview) -> int:
    before = [entry.num_out for entry in seeds.funnel if entry.stage != "manifest"]
    return before[-1] if before else 0


def _retrieved(context: Context, plan: Plan) -> tuple[Counter[str], Counter[str] | None] | None:
    """Return the pool images of each seed set, retrieved and in the manifest; None where a step is not finished."""
    rows = shard_rows(context, "pool")
    finished = {step.name for step in finished_verdicts(context, plan, "pool", rows)} if rows is not None else set()
    if rows is None or "retrieve" not in finished:
        return None
    unique: Counter[str] = Counter()
    final: Counter[str] | None = Counter() if "manifest_verdict" in finished else None
    for shard, num_rows in rows.items():
        table = read_aligned(context.run, "pool", "retrieve", shard, ["reject_reason", "seeds"], num_rows)
        kept = table.column(0).is_null().to_numpy()
        unique.update(_names(table, kept))
        if final is not None:
            verdict = read_aligned(context.run, "pool", "manifest_verdict", shard, ["reject_reason"], num_rows)
            final.update(_names(table, kept & verdict.column(0).is_null().to_numpy()))
    return unique, final


def _names(table: pa.Table, rows: np.ndarray) -> Counter[str]:
    names = table.column("seeds").take(pa.array(np.flatnonzero(rows))).combine_chunks().flatten()
    return Counter({entry["values"]: entry["counts"] for entry in names.value_counts().to_pylist()})
