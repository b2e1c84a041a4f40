"""Near-duplicates, copies of evaluation sets and copies of seeds, from copy-detection descriptors.

Pool images whose cosine is above ``threshold`` are copies; connected components of that graph are one image each, and one
representative stays: largest pixel area, then largest byte size, then smallest image id (equal ids are exact duplicates,
settled before by smallest URL). A component with any member within ``reference_threshold`` of a reference image is
dropped whole, and so is one with a member that copies a seed image which is in the manifest as it is: a component is one
image, and that image is there already.

Source: Oquab et al. 2023, "DINOv2", section 3 and appendix A.3 (arXiv 2304.07193); our choices where it is silent are in
docs/architecture.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation import schema
from curation.config import RunConfig
from curation.errors import StageError
from curation.indexes.components import UnionFind
from curation.indexes.exact import best_match, self_join
from curation.indexes.keys import hex_from_keys
from curation.indexes.vectors import pair_similarities, widen
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.vectors import Gathered, gather

AUDIT_FILE = "audit.parquet"
AUDIT = pa.schema(
    [
        schema.IMAGE_ID,  # pool or seed image
        pa.field("collection", pa.string()),  # of that image
        pa.field("copy_of", pa.string()),  # reference or seed image id
        pa.field("copy_of_collection", pa.string()),
        schema.SIMILARITY,
        schema.COMPONENT_ID,
        schema.COMPONENT_SIZE,
        pa.field("decision", pa.string()),  # reference_copy | seed_copy
    ]
)


@dataclass
class _Verdicts:
    """Columns of ``schema.DEDUP`` for gathered rows, each (N,); row -1 and reason None where nothing applies."""

    reason: npt.NDArray[Any]
    duplicate_of: npt.NDArray[Any]
    similarity: npt.NDArray[np.float64]


class DedupStage:
    """Exact neighbours of all descriptors, components, and what references and seeds say about them."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.SSCD)
    writes: Table | None = schema.DEDUP
    artefacts: tuple[str, ...] = (AUDIT_FILE,)

    def __init__(self, config: RunConfig) -> None:
        self.config = config.dedup
        self.as_is = frozenset(f"seeds/{name}" for name, seeds in config.seeds.items() if seeds.as_is)

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield a verdict table for each shard of the pool and of the seeds; leave the audit.

        Raises:
            StageError: References would drop more than ``max_dropped_fraction`` of the pool.
        """
        references = _gather(inputs, inputs.collections("references"), scratch / "references.f16")
        audit: list[dict[str, Any]] = []
        for collection in inputs.collections("seeds"):
            seeds = _gather(inputs, [collection], scratch / f"{collection.replace('/', '.')}.f16")
            verdicts = self._seed_verdicts(seeds, references, audit)
            yield from _tables(inputs, seeds, verdicts, None, None)
        as_is = [collection for collection in inputs.collections("seeds") if collection in self.as_is]
        seeds = _gather(inputs, as_is, scratch / "seeds.f16")
        pool = _gather(inputs, ["pool"], scratch / "pool.f16")
        labels = _components(pool, self.config.threshold)
        verdicts = self._pool_verdicts(inputs, pool, labels, references, seeds, audit)
        pq.write_table(pa.Table.from_pylist(audit, schema=AUDIT), scratch / AUDIT_FILE)
        self._check_dropped(verdicts, len(pool))
        sizes = np.bincount(labels, minlength=len(pool)) if len(pool) else np.empty(0, np.int64)
        smallest = _smallest_keys(pool, labels)
        yield from _tables(inputs, pool, verdicts, smallest, sizes[labels])

    def _seed_verdicts(self, seeds: Gathered, references: Gathered, audit: list[dict[str, Any]]) -> _Verdicts:
        verdicts = _none(len(seeds))
        rows, similarities = best_match(seeds.vectors, references.vectors, references.keys, num_threads=1)
        copies = np.flatnonzero(similarities > self.config.reference_threshold)
        _reject(verdicts, copies, "reference_copy", references, rows[copies], similarities[copies])
        _write_audit(audit, seeds, verdicts, copies, references, rows[copies], None)
        return verdicts

    def _pool_verdicts(
        self,
        inputs: ReduceInputs,
        pool: Gathered,
        labels: npt.NDArray[np.int64],
        references: Gathered,
        seeds: Gathered,
        audit: list[dict[str, Any]],
    ) -> _Verdicts:
        verdicts = _none(len(pool))
        representative = _representatives(inputs, pool, labels)[labels]
        copies = np.flatnonzero(representative != np.arange(len(pool)))
        similarities = _similarities(pool, copies, pool, representative[copies])
        _reject(verdicts, copies, "near_duplicate", pool, representative[copies], similarities)
        for kept_out, threshold, reason in (
            (self._as_is_and_clean(seeds, references), self.config.threshold, "seed_copy"),
            (references, self.config.reference_threshold, "reference_copy"),
        ):
            found, similarity = best_match(pool.vectors, kept_out.vectors, kept_out.keys, num_threads=1)
            evidence = _component_evidence(labels, found, similarity, threshold, kept_out)
            members = np.flatnonzero(evidence >= 0)
            cosines = _similarities(pool, members, kept_out, evidence[members])
            _reject(verdicts, members, reason, kept_out, evidence[members], cosines)
            _write_audit(audit, pool, verdicts, members, kept_out, evidence[members], labels)
        return verdicts

    def _as_is_and_clean(self, seeds: Gathered, references: Gathered) -> Gathered:
        """Return the seeds that stay in the manifest: those that copy no reference."""
        _, similarities = best_match(seeds.vectors, references.vectors, references.keys, num_threads=1)
        stay = similarities <= self.config.reference_threshold
        return Gathered(seeds.vectors[stay], seeds.keys[stay], seeds.shards[stay], seeds.rows[stay], seeds.places)

    def _check_dropped(self, verdicts: _Verdicts, num_pool: int) -> None:
        dropped = int(np.count_nonzero(verdicts.reason == "reference_copy"))
        if num_pool and dropped / num_pool > self.config.max_dropped_fraction:
            raise StageError(
                self.name,
                None,
                f"references would drop {dropped} of {num_pool} pool images ({dropped / num_pool:.0%}), more than "
                f"dedup.max_dropped_fraction {self.config.max_dropped_fraction:.0%}; look at "
                f"stopped/dedup/{AUDIT_FILE} in the run, then raise dedup.reference_threshold or the fraction",
            )


def _gather(inputs: ReduceInputs, collections: list[str], path: Path) -> Gathered:
    views = (view for collection in collections for view in inputs.shards(collection))
    return gather(views, schema.SSCD, path)


def _components(pool: Gathered, threshold: float) -> npt.NDArray[np.int64]:
    """Return the smallest row of each row's component, (N,). Every edge is used, so no hub loses copies to a limit k."""
    components = UnionFind(len(pool))
    for edges in self_join(pool.vectors, threshold, num_threads=1):
        components.add(edges.left, edges.right)
    return components.labels()


def _representatives(
    inputs: ReduceInputs, pool: Gathered, labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the row that represents each component, indexed by the component's label, (N,)."""
    area = np.empty(len(pool), np.int64)
    size = np.empty(len(pool), np.int64)
    for place, view in enumerate(inputs.shards("pool")):
        rows = np.flatnonzero(pool.shards == place)
        images = view.read(schema.FETCH, ["width", "height", "num_bytes"]).take(pa.array(pool.rows[rows]))
        area[rows] = images.column("width").to_numpy().astype(np.int64) * images.column("height").to_numpy()
        size[rows] = images.column("num_bytes").to_numpy()
    order = np.lexsort((pool.keys[:, 1], pool.keys[:, 0], -size, -area, labels))
    first = np.unique(labels[order], return_index=True)[1]
    best = np.full(len(pool), -1, np.int64)
    best[labels[order[first]]] = order[first]
    return best


def _component_evidence(
    labels: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
    similarity: npt.NDArray[np.float64],
    threshold: float,
    kept_out: Gathered,
) -> npt.NDArray[np.int64]:
    """Return, for each pool row, the row in ``kept_out`` that its component copies most closely, or -1, (N,)."""
    evidence = np.full(len(labels), -1, np.int64)
    copies = np.flatnonzero(similarity > threshold)
    if len(copies):
        keys = kept_out.keys[found[copies]]
        order = copies[np.lexsort((keys[:, 1], keys[:, 0], -similarity[copies], labels[copies]))]
        components, first = np.unique(labels[order], return_index=True)
        of_component = np.full(len(labels), -1, np.int64)
        of_component[components] = found[order[first]]
        evidence = of_component[labels]
    return evidence


def _similarities(
    left: Gathered, left_rows: npt.NDArray[np.int64], right: Gathered, right_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    similarities = np.empty(len(left_rows), np.float64)
    for start in range(0, len(left_rows), 8192):
        part = slice(start, start + 8192)
        pairs = np.arange(len(left_rows[part]))
        similarities[part] = pair_similarities(
            widen(left.vectors[left_rows[part]]), widen(right.vectors[right_rows[part]]), pairs, pairs
        )
    return similarities


def _none(num_rows: int) -> _Verdicts:
    return _Verdicts(
        np.full(num_rows, None, object), np.full(num_rows, None, object), np.full(num_rows, np.nan, np.float64)
    )


def _reject(
    verdicts: _Verdicts,
    rows: npt.NDArray[np.int64],
    reason: str,
    of: Gathered,
    of_rows: npt.NDArray[np.int64],
    similarities: npt.NDArray[np.float64],
) -> None:
    verdicts.reason[rows] = reason
    verdicts.duplicate_of[rows] = hex_from_keys(of.keys[of_rows])
    verdicts.similarity[rows] = similarities


def _smallest_keys(pool: Gathered, labels: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the smallest image id of each row's component, as hex, (N,)."""
    order = np.lexsort((pool.keys[:, 1], pool.keys[:, 0], labels))
    components, first, inverse = np.unique(labels[order], return_index=True, return_inverse=True)
    del components
    ids = np.array(hex_from_keys(pool.keys[order[first]]), object)
    smallest = np.full(len(pool), None, object)
    smallest[order] = ids[inverse] if len(ids) else None
    return smallest


def _write_audit(
    audit: list[dict[str, Any]],
    images: Gathered,
    verdicts: _Verdicts,
    rows: npt.NDArray[np.int64],
    of: Gathered,
    of_rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64] | None,
) -> None:
    ids = hex_from_keys(images.keys[rows])
    smallest = _smallest_keys(images, labels) if labels is not None else None
    sizes = np.bincount(labels, minlength=len(images)) if labels is not None and len(images) else None
    for image_id, row, of_row in zip(ids, rows.tolist(), of_rows.tolist(), strict=True):
        audit.append(
            {
                "image_id": image_id,
                "collection": images.places[images.shards[row]][0],
                "copy_of": verdicts.duplicate_of[row],
                "copy_of_collection": of.places[of.shards[of_row]][0],
                "similarity": verdicts.similarity[row],
                "component_id": None if smallest is None else smallest[row],
                "component_size": None if sizes is None or labels is None else int(sizes[labels[row]]),
                "decision": verdicts.reason[row],
            }
        )


def _tables(
    inputs: ReduceInputs,
    rows: Gathered,
    verdicts: _Verdicts,
    smallest: npt.NDArray[Any] | None,
    sizes: npt.NDArray[np.int64] | None,
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield row-aligned verdicts for the shards that the rows were gathered from."""
    num_rows: dict[tuple[str, int], int] = {}
    for collection in dict.fromkeys(collection for collection, _ in rows.places):
        num_rows |= {(view.collection, view.shard): view.num_rows for view in inputs.shards(collection)}
    for place, (collection, shard) in enumerate(rows.places):
        mine = np.flatnonzero(rows.shards == place)
        take = np.full(num_rows[collection, shard], -1, np.int64)
        take[rows.rows[mine]] = np.arange(len(mine))
        columns = [
            pa.array(verdicts.reason[mine], pa.string()),
            pa.array(verdicts.duplicate_of[mine], pa.string()),
            pa.array(verdicts.similarity[mine].astype(np.float32), pa.float32(), mask=np.isnan(verdicts.similarity[mine])),
            pa.array(smallest[mine], pa.string()) if smallest is not None else pa.nulls(len(mine), pa.string()),
            pa.array(sizes[mine], pa.int32()) if sizes is not None else pa.nulls(len(mine), pa.int32()),
        ]
        found = pa.table(columns, schema=schema.DEDUP.schema)
        if not len(mine):
            found = pa.table([pa.nulls(1, field.type) for field in schema.DEDUP.schema], schema=schema.DEDUP.schema)
        yield collection, shard, found.take(pa.array(take, mask=take < 0))
