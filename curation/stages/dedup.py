"""Near-duplicates, copies of evaluation sets and copies of seeds, from pairs of similar images that were found before.

Pool images whose cosine is above ``threshold`` are copies; connected components of that graph are one image each, and
one representative stays: largest pixel area, then largest byte size, then smallest image id (equal ids are exact
duplicates, settled before by smallest URL). A component with any member within ``reference_threshold`` of a reference
image is dropped whole (or only those members, see ``decontaminate``), and so is one with a member that copies a seed
image which is in the manifest as it is: a component is one image, and that image is there already. A row without a
usable descriptor is in no component and stays.

Pairs stream from files and are never all in memory; descriptors are read of rejected rows only, for their exact cosine
with what they copy. Interrupted, it starts again from the same pairs, which is cheap beside finding them.

Memory: about 30 bytes a pool row, 150 bytes a pool row that has a copy, and 50 bytes a seed or reference row. Scratch
disk: 1 KiB a representative of several images, or a reference that something copies.

Source: Oquab et al. 2023, "DINOv2", section 3 and appendix A.3 (arXiv 2304.07193); our choices where it is silent are
in docs/architecture.md, how the search is cut into tasks in docs/dedup.md.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.config import RunConfig
from curation.errors import StageError
from curation.indexes.keys import Keys, hex_from_keys
from curation.indexes.vectors import Rows
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.dedup_audit import AUDIT, AUDIT_FILE, Audit, Dropped
from curation.stages.dedup_edges import DedupEdges
from curation.stages.dedup_groups import Groups, components, split
from curation.stages.dedup_rows import Known, Matches, Numbered, best_matches, cosines, numbered_pairs
from curation.stages.dedup_search import SEARCH_FILE, DedupFit

__all__ = ["AUDIT", "AUDIT_FILE", "DedupStage"]

logger = logging.getLogger(__name__)

_REASONS = pa.array([None, "near_duplicate", "seed_copy", "reference_copy"], pa.string())
_KEPT, _NEAR, _SEED, _REFERENCE = range(4)
_NOBODY = -1
_OUTGROWN = 2  # times exact_max_rows at which a run is told that it could be searched faster


class _Verdicts:
    """What becomes of M rows; ``of`` and ``similarity`` count where the reason is not ``_KEPT``."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows  # ascending
        self.reason: npt.NDArray[np.uint8] = np.full(len(rows), _KEPT, np.uint8)
        self.of: Rows = np.full(len(rows), _NOBODY)  # a pool row, or a row of seeds or references, by the reason
        self.similarity: npt.NDArray[np.float32] = np.full(len(rows), np.nan, np.float32)
        self.is_direct: npt.NDArray[np.bool_] = np.zeros(len(rows), bool)  # it copies that itself

    def reject(self, places: Rows, reason: int, of: Rows) -> None:
        """Reject some of the rows as copies of others."""
        self.reason[places], self.of[places], self.is_direct[places] = reason, of, False

    def matched(self, places: Rows, matches: Matches) -> None:
        """Say of rejected rows that they copy something themselves, and what."""
        self.of[places], self.similarity[places], self.is_direct[places] = matches.of, matches.similarity, True

    def dropped(self, places: Rows) -> Dropped:
        """Return rejected rows as the audit takes them."""
        return Dropped(self.rows[places], self.of[places], self.similarity[places], self.is_direct[places], places)

    def compare(self, reason: int, images: Numbered, of: Numbered, scratch: Path) -> None:
        """Fill in the similarity of rows with a reason that were rejected because of others."""
        (places,) = np.nonzero((self.reason == reason) & ~self.is_direct)
        self.similarity[places] = cosines(images, self.rows[places], of, self.of[places], scratch)


class DedupStage:
    """Components of near-duplicates, and what references and seeds say about them."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 2
    reads: tuple[Table, ...] = (schema.CRAWL, schema.FETCH, schema.SSCD, schema.DEDUP_CODES)
    writes: Table | None = schema.DEDUP
    artefacts: tuple[str, ...] = (AUDIT_FILE,)

    def __init__(self, config: RunConfig) -> None:
        self.config = config.dedup
        self.as_is = [f"seeds/{name}" for name, seeds in sorted(config.seeds.items()) if seeds.as_is]

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield a verdict table for each shard of the seeds and of the pool; leave the audit.

        Raises:
            StageError: References would drop more than ``max_dropped_fraction`` of the pool. Nothing is yielded.
        """
        references, seeds = Known.of(inputs, "references"), Known.of(inputs, "seeds")
        pool = Numbered.of(inputs, "pool")
        of_seeds = self._seed_verdicts(inputs, seeds, references)
        of_references = self._matches(inputs, pool, references)
        copies_of_seeds = self._seed_matches(inputs, pool, seeds, of_seeds)
        groups = self._groups(inputs, pool, np.union1d(of_references.rows, copies_of_seeds.rows), scratch)
        of_pool = self._pool_verdicts(groups, references, of_references, seeds, copies_of_seeds)
        for reason, of in ((_NEAR, pool), (_SEED, seeds.rows), (_REFERENCE, references.rows)):
            of_pool.compare(reason, pool, of, scratch)
        with Audit(scratch / AUDIT_FILE) as audit:
            for decision, verdicts, images, reason, known in (
                ("reference_copy", of_seeds, seeds.rows, _REFERENCE, references),
                ("reference_copy", of_pool, pool, _REFERENCE, references),
                ("seed_copy", of_pool, pool, _SEED, seeds),
            ):
                (places,) = np.nonzero(verdicts.reason == reason)
                audit.add(decision, images, verdicts.dropped(places), known, groups if images is pool else None)
        num_searched = len(pool.searched())
        self._check_dropped(of_pool, num_searched)
        self._advise(inputs, num_searched)
        yield from _tables(seeds.rows, of_seeds, None, _keys_of(of_seeds, None, seeds, references))
        yield from _tables(pool, of_pool, groups, _keys_of(of_pool, groups, seeds, references))

    def _matches(self, inputs: ReduceInputs, images: Numbered, references: Known) -> Matches:
        names, threshold = references.rows.collections, self.config.reference_threshold
        return best_matches(inputs, DedupEdges.name, images, references, names, threshold)

    def _seed_verdicts(self, inputs: ReduceInputs, seeds: Known, references: Known) -> _Verdicts:
        matches = self._matches(inputs, seeds.rows, references)
        verdicts = _Verdicts(matches.rows)
        everything = np.arange(len(matches.rows))
        verdicts.reject(everything, _REFERENCE, matches.of)
        verdicts.matched(everything, matches)
        return verdicts

    def _seed_matches(self, inputs: ReduceInputs, pool: Numbered, seeds: Known, of_seeds: _Verdicts) -> Matches:
        """Return which pool images copy seeds that are in the manifest: those that copy a reference are not."""
        stays = np.ones(len(seeds.rows), bool)
        stays[of_seeds.rows] = False
        return best_matches(inputs, DedupEdges.name, pool, seeds, self.as_is, self.config.threshold, stays)

    def _groups(self, inputs: ReduceInputs, pool: Numbered, matched: Rows, scratch: Path) -> Groups:
        pairs = numbered_pairs(inputs, DedupEdges.name, pool, pool, "pool", "pool", self.config.threshold)
        groups = components(len(pool), ((left, right) for left, right, _ in pairs), matched, pool)
        limit = self.config.min_similarity_to_representative
        return groups if limit is None else split(groups, pool, limit, scratch)

    def _pool_verdicts(
        self, groups: Groups, references: Known, of_references: Matches, seeds: Known, of_seeds: Matches
    ) -> _Verdicts:
        verdicts = _Verdicts(groups.rows)
        dropped = np.searchsorted(groups.rows, of_references.rows)
        stays = np.ones(len(groups), bool)
        if self.config.decontaminate == "neighbours":
            stays[dropped] = False
        best = groups.best(stays)[groups.labels]
        (copies,) = np.nonzero(best != np.arange(len(groups)))
        verdicts.reject(copies, _NEAR, groups.rows[best[copies]])
        copied = _copied(groups, of_seeds, seeds)[groups.labels]
        (rejected,) = np.nonzero(copied != _NOBODY)
        verdicts.reject(rejected, _SEED, copied[rejected])
        verdicts.matched(np.searchsorted(groups.rows, of_seeds.rows), of_seeds)
        if self.config.decontaminate == "neighbours":
            verdicts.reject(dropped, _REFERENCE, of_references.of)
        else:
            copied = _copied(groups, of_references, references)[groups.labels]
            (rejected,) = np.nonzero(copied != _NOBODY)
            verdicts.reject(rejected, _REFERENCE, copied[rejected])
        verdicts.matched(dropped, of_references)
        return verdicts

    def _check_dropped(self, verdicts: _Verdicts, num_pool: int) -> None:
        dropped = int(np.isin(verdicts.reason, (_REFERENCE, _SEED)).sum())
        if num_pool and dropped / num_pool > self.config.max_dropped_fraction:
            raise StageError(
                self.name,
                None,
                f"references and seeds would drop {dropped} of {num_pool} pool images ({dropped / num_pool:.0%}), more "
                f"than dedup.max_dropped_fraction {self.config.max_dropped_fraction:.0%}; look at "
                f"stopped/dedup/{AUDIT_FILE} in the run, then raise dedup.reference_threshold, dedup.threshold or "
                "the fraction",
            )

    def _advise(self, inputs: ReduceInputs, num_pool: int) -> None:
        """Say that a run has outgrown the exact search that it began with."""
        if self.config.backend != "auto" or num_pool <= _OUTGROWN * self.config.exact_max_rows:
            return
        found = json.loads((inputs.artefacts(DedupFit.name) / SEARCH_FILE).read_text(encoding="utf-8"))
        if found["backend"] == "exact":
            logger.warning(
                "dedup compares all pairs of %d images, as it did when they were few; `--stage dedup --refit` fits a "
                "search that is faster",
                num_pool,
            )


def _copied(groups: Groups, matches: Matches, of: Known) -> Rows:
    """Return what each component copies most closely, (C,), of equals the smallest image id; ``_NOBODY``: nothing."""
    labels = groups.labels[np.searchsorted(groups.rows, matches.rows)]
    order = np.lexsort((of.ranks[matches.of], -matches.millionths, labels))
    different, first = np.unique(labels[order], return_index=True)
    copied = np.full(len(groups.sizes), _NOBODY)
    copied[different] = matches.of[order[first]]
    return copied


def _keys_of(verdicts: _Verdicts, groups: Groups | None, seeds: Known, references: Known) -> Keys:
    """Return the image id that each row is a copy of, (M, 2); anything where it is none."""
    keys_M2 = np.zeros((len(verdicts.rows), 2), np.uint64)
    for reason, keys in ((_SEED, seeds.keys), (_REFERENCE, references.keys)):
        mine = verdicts.reason == reason
        keys_M2[mine] = keys[verdicts.of[mine]]
    if groups is not None:
        mine = verdicts.reason == _NEAR
        keys_M2[mine] = groups.keys[np.searchsorted(groups.rows, verdicts.of[mine])]
    return keys_M2


def _tables(
    images: Numbered, verdicts: _Verdicts, groups: Groups | None, copy_of: Keys
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield row-aligned verdicts for the shards of a collection; only the pool has components."""
    bounds = np.searchsorted(verdicts.rows, images.starts)
    for view, first, start, stop in zip(images.views, images.starts, bounds[:-1], bounds[1:], strict=False):
        rows, mine = verdicts.rows[start:stop] - first, slice(start, stop)
        kept = verdicts.reason[mine] == _KEPT
        place = np.full(view.num_rows, -1)
        place[rows] = np.arange(len(rows))
        aligned = pa.array(place, mask=place < 0)
        columns = [
            _REASONS.take(pa.array(verdicts.reason[mine])).take(aligned),
            pa.array(hex_from_keys(copy_of[mine]), pa.string(), mask=kept).take(aligned),
            pa.array(verdicts.similarity[mine], mask=kept).take(aligned),
        ]
        if groups is None:
            columns += [pa.nulls(view.num_rows, pa.string()), pa.nulls(view.num_rows, pa.int32())]
        else:
            searched = view.read(schema.DEDUP_CODES, ["searched"]).column(0).combine_chunks()
            own_ids = view.read(schema.FETCH, ["image_id"]).column(0).combine_chunks()
            ids, sizes = groups.describe(np.arange(start, stop))
            columns.append(pc.if_else(searched, pc.coalesce(ids.take(aligned), own_ids), None))
            columns.append(pc.if_else(searched, pc.coalesce(sizes.take(aligned), pa.scalar(1, pa.int32())), None))
        yield view.collection, view.shard, pa.table(columns, schema=schema.DEDUP.schema)
