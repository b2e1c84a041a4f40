"""Near-duplicates, copies of evaluation sets and copies of seeds, from copy-detection descriptors.

Pool images whose cosine is above ``threshold`` are copies; connected components of that graph are one image each, and
one representative stays: largest pixel area, then largest byte size, then smallest image id (equal ids are exact
duplicates, settled before by smallest URL). A component with any member within ``reference_threshold`` of a reference
image is dropped whole, and so is one with a member that copies a seed image which is in the manifest as it is: a
component is one image, and that image is there already. A row without a usable descriptor is in no component and stays.

Memory: about 150 bytes a pool image (20 gathered, 32 of components, 21 of verdicts, and up to 70 while something is
compared or sorted), 80 bytes a seed or reference image, and blocks of vectors. Scratch disk: 1 KiB an image. Time is
quadratic in the pool.

Source: Oquab et al. 2023, "DINOv2", section 3 and appendix A.3 (arXiv 2304.07193); our choices where it is silent are
in docs/architecture.md.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config import RunConfig
from curation.errors import StageError
from curation.indexes.components import UnionFind
from curation.indexes.exact import BLOCK_ROWS, nearest, self_join
from curation.indexes.keys import Keys, hex_from_keys
from curation.indexes.vectors import Rows, Similarities, blocks, pair_similarities, widen
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.dedup_audit import AUDIT, AUDIT_FILE, Audit, Components
from curation.stages.vectors import Gathered, gather

__all__ = ["AUDIT", "AUDIT_FILE", "DedupStage"]

_REASONS = pa.array([None, "near_duplicate", "seed_copy", "reference_copy"], pa.string())
_KEPT, _NEAR, _SEED, _REFERENCE = range(4)


class _Verdicts:
    """Columns of ``schema.DEDUP`` for N gathered rows; key and similarity count where the reason is not ``_KEPT``."""

    def __init__(self, num_rows: int) -> None:
        self.reason: npt.NDArray[np.uint8] = np.full(num_rows, _KEPT, np.uint8)
        self.duplicate_of: Keys = np.zeros((num_rows, 2), np.uint64)
        self.similarity: npt.NDArray[np.float32] = np.zeros(num_rows, np.float32)

    def reject(self, rows: Rows, reason: int, images: Gathered, of: Gathered, of_rows: Rows) -> None:
        """Reject rows of ``images`` as copies of rows of ``of``."""
        self.reason[rows] = reason
        self.duplicate_of[rows] = of.keys[of_rows]
        for start, stop in blocks(len(rows), BLOCK_ROWS):
            pairs = np.arange(stop - start)
            left_BD, right_BD = widen(images.vectors[rows[start:stop]]), widen(of.vectors[of_rows[start:stop]])
            self.similarity[rows[start:stop]] = pair_similarities(left_BD, right_BD, pairs, pairs)


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
        """Yield a verdict table for each shard of the seeds and of the pool; leave the audit.

        Raises:
            StageError: References would drop more than ``max_dropped_fraction`` of the pool. Nothing is yielded.
        """
        references = _gather(inputs, inputs.collections("references"), scratch / "references.f16")
        seeds = _gather(inputs, inputs.collections("seeds"), scratch / "seeds.f16")
        pool = _gather(inputs, ["pool"], scratch / "pool.f16")
        with Audit(scratch / AUDIT_FILE) as audit:
            of_seeds = self._seed_verdicts(seeds, references, audit)
            components = _components(inputs, pool, self.config.threshold)
            of_pool = self._pool_verdicts(pool, components, references, seeds, of_seeds, audit)
        self._check_dropped(of_pool)
        yield from _tables(seeds, of_seeds, None)
        yield from _tables(pool, of_pool, components)

    def _seed_verdicts(self, seeds: Gathered, references: Gathered, audit: Audit) -> _Verdicts:
        verdicts = _Verdicts(len(seeds))
        found, similarity = _best_match(seeds, references, np.arange(len(references)))
        rows = np.flatnonzero(similarity > self.config.reference_threshold)
        verdicts.reject(rows, _REFERENCE, seeds, references, found[rows])
        audit.add("reference_copy", seeds, rows, references, found[rows], verdicts.similarity[rows])
        return verdicts

    def _pool_verdicts(
        self,
        pool: Gathered,
        components: Components,
        references: Gathered,
        seeds: Gathered,
        of_seeds: _Verdicts,
        audit: Audit,
    ) -> _Verdicts:
        verdicts = _Verdicts(len(pool))
        of_row = components.best[components.labels]
        copies = np.flatnonzero(of_row != np.arange(len(pool)))
        verdicts.reject(copies, _NEAR, pool, pool, of_row[copies])
        is_as_is = np.array([place.collection in self.as_is for place in seeds.places], bool)
        stay = np.flatnonzero(of_seeds.reason == _KEPT)
        stay = stay[is_as_is[seeds.place_of(stay)]] if len(stay) else stay
        config, everything = self.config, np.arange(len(references))
        for decision, reason, of, of_rows, threshold in (
            ("reference_copy", _REFERENCE, references, everything, config.reference_threshold),
            ("seed_copy", _SEED, seeds, stay, config.threshold),
        ):
            rows, copied = _copied(components.labels, of, *_best_match(pool, of, of_rows), threshold)
            new = verdicts.reason[rows] != _REFERENCE  # what copies both is a reference copy
            rows, copied = rows[new], copied[new]
            verdicts.reject(rows, reason, pool, of, copied)
            audit.add(decision, pool, rows, of, copied, verdicts.similarity[rows], components)
        return verdicts

    def _check_dropped(self, verdicts: _Verdicts) -> None:
        num_pool = len(verdicts.reason)
        dropped = int(np.count_nonzero(verdicts.reason == _REFERENCE))
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


def _components(inputs: ReduceInputs, pool: Gathered, threshold: float) -> Components:
    """Return the components of the pool. Every edge is used, so no hub loses copies to a limit k."""
    union = UnionFind(len(pool))
    for edges in self_join(pool.vectors, threshold, num_threads=1):
        union.add(edges.left, edges.right)
    labels = union.labels()
    sizes = np.bincount(labels, minlength=len(pool))
    several = np.flatnonzero(sizes[labels] > 1)  # the others represent themselves: no need to sort them
    high, low = pool.keys[several, 0], pool.keys[several, 1]
    area, num_bytes = _sizes(inputs, pool, several)
    smallest, best = np.arange(len(pool)), np.arange(len(pool))
    for rows, order_by in ((smallest, (high, low)), (best, (-area, -num_bytes, high, low))):
        component, first = _first(labels[several], *order_by)
        rows[component] = several[first]
    return Components(labels, sizes, smallest, best)


def _sizes(inputs: ReduceInputs, pool: Gathered, rows: Rows) -> tuple[Rows, Rows]:
    """Return the pixel area and the byte size of ascending pool rows, both (len(rows),)."""
    area, num_bytes = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    bounds = np.searchsorted(rows, pool.starts)
    for view, start, stop in zip(inputs.shards("pool"), bounds[:-1], bounds[1:], strict=True):
        images = view.read(schema.FETCH, ["width", "height", "num_bytes"])
        images = images.take(pa.array(pool.rows[rows[start:stop]]))
        area[start:stop] = images.column("width").to_numpy().astype(np.int64) * images.column("height").to_numpy()
        num_bytes[start:stop] = images.column("num_bytes").to_numpy()
    return area, num_bytes


def _first(labels: Rows, *order_by: npt.NDArray[np.generic]) -> tuple[Rows, Rows]:
    """Return each different label, ascending, and the index of its first entry.

    First by ``order_by``, whose most significant array comes first.
    """
    order = np.lexsort((*reversed(order_by), labels))
    different, first = np.unique(labels[order], return_index=True)
    return different, order[first]


def _best_match(images: Gathered, of: Gathered, of_rows: Rows) -> tuple[Rows, Similarities]:
    """Return the most similar of some rows of ``of`` for each image, and that similarity, both (N,).

    -1 and -inf if there is none. Ties go to the smaller key, then the smaller row.
    """
    if not len(images) or not len(of_rows):
        return np.full(len(images), -1), np.full(len(images), -np.inf)
    parts = (
        (of.vectors[of_rows[start:stop]], of.keys[of_rows[start:stop]])
        for start, stop in blocks(len(of_rows), 4 * BLOCK_ROWS)
    )
    found = nearest(images.vectors, parts, 1, num_threads=1)
    return of_rows[found.rows[:, 0]], found.similarities[:, 0]


def _copied(labels: Rows, of: Gathered, found: Rows, similarity: Similarities, threshold: float) -> tuple[Rows, Rows]:
    """Return the rows of components with a member above ``threshold``, and what each component copies most, both (M,).

    Args:
        labels: (N,) of the pool.
        of: What ``found`` (N,) are rows of.
        found: The best match of each pool row.
        similarity: (N,) with it.
        threshold: Exclusive.
    """
    copies = np.flatnonzero(similarity > threshold)
    keys = of.keys[found[copies]]
    component, first = _first(labels[copies], -similarity[copies], keys[:, 0], keys[:, 1])
    copied = np.full(len(labels), -1)
    copied[component] = found[copies[first]]
    rows = np.flatnonzero(copied[labels] >= 0)
    return rows, copied[labels[rows]]


def _tables(
    images: Gathered, verdicts: _Verdicts, components: Components | None
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield row-aligned verdicts for the shards that the images were gathered from."""
    for index, (collection, shard, num_rows) in enumerate(images.places):
        mine = np.arange(images.starts[index], images.starts[index + 1])
        kept = verdicts.reason[mine] == _KEPT
        ids, sizes = components.of(images, mine) if components is not None else (None, None)
        columns = [
            _REASONS.take(pa.array(verdicts.reason[mine])),
            pa.array(hex_from_keys(verdicts.duplicate_of[mine]), pa.string(), mask=kept),
            pa.array(verdicts.similarity[mine], mask=kept),
            pa.nulls(len(mine), pa.string()) if ids is None else ids,
            pa.nulls(len(mine), pa.int32()) if sizes is None else sizes,
        ]
        place = np.full(num_rows, -1)
        place[images.rows[mine]] = np.arange(len(mine))
        aligned = pa.array(place, mask=place < 0)
        yield collection, shard, pa.table([column.take(aligned) for column in columns], schema=schema.DEDUP.schema)
