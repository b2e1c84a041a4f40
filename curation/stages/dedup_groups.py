"""Components of near-duplicates, who represents each, and how chained ones are split.

The representative is the image with the largest pixel area, then the largest byte size, then the smallest image id.

**Splitting.** Connected components chain: a like b and b like c makes one component of a, b and c, however unlike a and
c are. With ``min_similarity_to_representative`` a component with a member that is less like its representative than
that is covered by stars: the representative keeps the members that are at least as like it, the best of the rest by the
same rule becomes the next one and keeps its own, until none is left. Each star is a component of its own from then on.
It depends on the members alone, not on which edges were found first. Time: members times stars.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.indexes.components import UnionFind
from curation.indexes.keys import Keys, hex_from_keys
from curation.indexes.vectors import Rows, Vectors, blocks, pair_similarities, widen
from curation.stages.dedup_rows import Numbered, cosines

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Groups:
    """Components of M pool rows: those that have a copy, and those that something else is asked of.

    Attributes:
        rows: (M,) pool rows, ascending.
        labels: (M,) number of the component, below C.
        keys: (M, 2) image ids.
        order: (M,) positions by component, then by the rule of representatives.
        sizes: (C,) members.
        smallest: (C,) position of the smallest image id.
    """

    rows: Rows
    labels: Rows
    keys: Keys
    order: Rows
    sizes: Rows
    smallest: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def best(self, among: npt.NDArray[np.bool_]) -> Rows:
        """Return the position that represents each component, (C,), of those in ``among`` (M,); -1: there is none."""
        mine = self.order[among[self.order]]
        found = np.full(len(self.sizes), -1)
        labels, first = np.unique(self.labels[mine], return_index=True)
        found[labels] = mine[first]
        return found

    def describe(self, positions: Rows) -> tuple[pa.Array, pa.Array]:
        """Return ``component_id`` and ``component_size`` of some members."""
        labels = self.labels[positions]
        ids = hex_from_keys(self.keys[self.smallest[labels]])
        return pa.array(ids, pa.string()), pa.array(self.sizes[labels].astype(np.int32))


def components(num_rows: int, edges: Iterator[tuple[Rows, Rows]], also: Rows, pool: Numbered) -> Groups:
    """Return the components of the pool.

    Args:
        num_rows: Of the pool.
        edges: Batches of pairs of rows.
        also: Rows that are wanted though nothing copies them.
        pool: Where sizes and ids come from.
    """
    union = UnionFind(num_rows)
    for left, right in edges:
        union.add(left, right)
    labels = union.labels()
    several = np.bincount(labels, minlength=num_rows) > 1
    wanted = several[labels]
    wanted[also] = True
    (rows,) = np.nonzero(wanted)
    area, num_bytes = _sizes(pool, rows)
    keys_M2 = pool.keys(rows)
    return _grouped(rows, labels[rows], keys_M2, np.lexsort((keys_M2[:, 1], keys_M2[:, 0], -num_bytes, -area)))


def split(groups: Groups, pool: Numbered, limit: float, scratch: Path) -> Groups:
    """Return the components, those with a member below ``limit`` to its representative split into stars."""
    best = groups.best(np.ones(len(groups), bool))[groups.labels]
    (others,) = np.nonzero(best != np.arange(len(groups)))
    far = cosines(pool, groups.rows[others], pool, groups.rows[best[others]], scratch) < limit
    is_chained = np.zeros(len(groups.sizes), bool)
    is_chained[groups.labels[others[far]]] = True
    members = groups.order[is_chained[groups.labels[groups.order]]]  # by component, the best first
    if not len(members):
        return groups
    ascending = np.argsort(members)
    path = scratch / "chained.f16"
    vectors = pool.descriptors(groups.rows[members[ascending]], ascending, path)
    labels = groups.labels.copy()
    num_labels = len(groups.sizes)
    bounds = np.flatnonzero(np.diff(groups.labels[members], prepend=-1, append=-1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for star in _stars(vectors[start:stop], limit):
            labels[members[start + star]] = num_labels
            num_labels += 1
    return _grouped(groups.rows, labels, groups.keys, groups.order)  # members of a star keep their order


def _stars(vectors_MD: Vectors, limit: float) -> Iterator[Rows]:
    """Yield the members of each star of a component whose members come best first."""
    rest = np.arange(len(vectors_MD))
    while len(rest):
        is_like = np.empty(len(rest), bool)
        centre_1D = widen(vectors_MD[rest[:1]])
        for start, stop in blocks(len(rest), _BLOCK_ROWS):
            mine = np.arange(stop - start)
            found = pair_similarities(centre_1D, widen(vectors_MD[rest[start:stop]]), np.zeros_like(mine), mine)
            is_like[start:stop] = found >= limit
        is_like[0] = True  # its cosine with itself may be rounded to less than a limit near 1
        yield rest[is_like]
        rest = rest[~is_like]


def _grouped(rows: Rows, labels: Rows, keys_M2: Keys, by_rule: Rows) -> Groups:
    """Number components through, and order their members.

    Args:
        rows: (M,) ascending.
        labels: (M,) any numbers.
        keys_M2: Image ids.
        by_rule: (M,) positions, those that come first by the rule first.
    """
    different, labels = np.unique(labels, return_inverse=True)
    order = by_rule[np.argsort(labels[by_rule], kind="stable")]
    by_key = np.lexsort((keys_M2[:, 1], keys_M2[:, 0], labels))
    _, first = np.unique(labels[by_key], return_index=True)
    return Groups(rows, labels, keys_M2, order, np.bincount(labels, minlength=len(different)), by_key[first])


def _sizes(pool: Numbered, rows_M: Rows) -> tuple[Rows, Rows]:
    """Return the pixel area and the byte size of ascending pool rows, both (M,)."""
    area, num_bytes = np.empty(len(rows_M), np.int64), np.empty(len(rows_M), np.int64)
    for view, mine, rows in pool.parts(rows_M):
        images = view.read(schema.FETCH, ["width", "height", "num_bytes"]).take(pa.array(rows))
        area[mine] = images.column("width").to_numpy().astype(np.int64) * images.column("height").to_numpy()
        num_bytes[mine] = images.column("num_bytes").to_numpy()
    return area, num_bytes
