"""Rows of whole collections by number, and what is known of some of them: ids, similarities, best matches.

Reads shards only where something is asked of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.vectors import PER_UNIT, Rows, Similarities, Vectors, blocks, pair_similarities, widen
from curation.stage import ReduceInputs, ShardView
from curation.stages.vectors import matrix

_BLOCK_ROWS = 4096
_PENDING = 1 << 20


@dataclass(frozen=True)
class Numbered:
    """All rows of some collections, numbered through in the order of collections and shards.

    Attributes:
        views: The shards.
        starts: (len(views) + 1,) number of each shard's first row, and of rows.
    """

    views: tuple[ShardView, ...]
    starts: Rows

    @classmethod
    def of(cls, inputs: ReduceInputs, kind: str) -> "Numbered":
        """Number the rows of all collections of a kind."""
        views = tuple(view for collection in inputs.collections(kind) for view in inputs.shards(collection))
        return cls(views, np.concatenate([[0], np.cumsum([view.num_rows for view in views], dtype=np.int64)]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def collections(self) -> list[str]:
        """Names of the collections, in order."""
        return list(dict.fromkeys(view.collection for view in self.views))

    def first_rows(self, collection: str) -> Rows:
        """Return the number of the first row of each shard of a collection, by shard; -1: no such shard."""
        mine = [(view.shard, start) for view, start in zip(self.views, self.starts, strict=False)
                if view.collection == collection]  # fmt: skip
        first = np.full(max((shard for shard, _ in mine), default=-1) + 1, -1, np.int64)
        for shard, start in mine:
            first[shard] = start
        return first

    def collection_of(self, rows_N: Rows) -> pa.Array:
        """Return the collection of each row."""
        names = pa.array([view.collection for view in self.views], pa.string())
        return names.take(pa.array(np.searchsorted(self.starts, rows_N, side="right") - 1))

    def parts(self, rows_N: Rows) -> Iterator[tuple[ShardView, slice, Rows]]:
        """Yield the shards of ascending rows: the shard, which of the rows are its own, and their numbers in it."""
        bounds = np.searchsorted(rows_N, self.starts)
        for view, start, begin, end in zip(self.views, self.starts, bounds[:-1], bounds[1:], strict=False):
            if begin < end:
                yield view, slice(int(begin), int(end)), rows_N[begin:end] - start

    def keys(self, rows_N: Rows) -> Keys:
        """Return the image ids of ascending rows that have one, (N, 2)."""
        keys_N2 = np.empty((len(rows_N), 2), np.uint64)
        for view, mine, rows in self.parts(rows_N):
            ids = view.read(schema.FETCH, ["image_id"]).column(0).take(pa.array(rows))
            keys_N2[mine] = keys_from_hex(ids.to_pylist())
        return keys_N2

    def searched(self) -> Rows:
        """Return the rows that are searched, ascending."""
        found = [np.empty(0, np.int64)]
        for view, start in zip(self.views, self.starts, strict=False):
            (rows,) = np.nonzero(view.read(schema.DEDUP_CODES, ["searched"]).column(0).to_numpy())
            found.append(rows + start)
        return np.concatenate(found)

    def urls(self, rows_N: Rows) -> pa.Array:
        """Return the URLs of rows in any order."""
        ascending, place = np.unique(rows_N, return_inverse=True)
        found = [
            view.read(schema.CRAWL, ["url"]).column(0).take(pa.array(rows)) for view, _, rows in self.parts(ascending)
        ]
        chunks = [chunk for column in found for chunk in column.chunks]
        return pa.chunked_array(chunks, pa.string()).take(pa.array(place)).combine_chunks()

    def descriptors(self, rows_N: Rows, places_N: Rows, path: Path) -> Vectors:
        """Copy the descriptors of ascending rows into a scratch file, each to its place, and return it mapped."""
        stored: Vectors | None = None
        for view, mine, rows in self.parts(rows_N):
            vectors_MD = matrix(view.read(schema.SSCD).column(0), rows)
            if stored is None:
                stored = np.memmap(path, np.float16, "w+", shape=(len(rows_N), vectors_MD.shape[1]))
            stored[places_N[mine]] = vectors_MD
        return np.empty((0, 1), np.float16) if stored is None else stored


@dataclass(frozen=True)
class Known:
    """Rows of seeds or references with the rank of each by image id; rows that are not searched have the rank -1."""

    rows: Numbered
    keys: Keys  # (N, 2)
    ranks: Rows  # (N,)

    @classmethod
    def of(cls, inputs: ReduceInputs, kind: str) -> "Known":
        """Read the ids of all collections of a kind."""
        numbered = Numbered.of(inputs, kind)
        searched = numbered.searched()
        keys_N2 = np.zeros((len(numbered), 2), np.uint64)
        ranks = np.full(len(numbered), -1)
        found = numbered.keys(searched)
        keys_N2[searched] = found
        ranks[searched[np.lexsort((searched, found[:, 1], found[:, 0]))]] = np.arange(len(searched))
        return cls(numbered, keys_N2, ranks)


@dataclass(frozen=True)
class Matches:
    """What some rows copy most closely.

    Attributes:
        rows: (D,) ascending.
        of: (D,) rows of a ``Known``.
        millionths: (D,) their cosine, times a million.
    """

    rows: Rows
    of: Rows
    millionths: npt.NDArray[np.int32]

    @property
    def similarity(self) -> Similarities:
        """The cosine, (D,)."""
        similarity: Similarities = self.millionths / PER_UNIT
        return similarity


def best_matches(
    inputs: ReduceInputs,
    step: str,
    images: Numbered,
    of: Known,
    collections: Sequence[str],
    threshold: float,
    usable: npt.NDArray[np.bool_] | None = None,
) -> Matches:
    """Return the best match of each image above a threshold; of equals, the one with the smallest image id.

    Args:
        inputs: Of the reduce.
        step: The block stage that found the pairs.
        images: Left rows.
        of: Right rows.
        collections: Of ``of``, those that are looked at.
        threshold: Exclusive.
        usable: Which rows of ``of`` count, (len(of.rows),).
    """
    none = np.empty(0, np.int64)
    best = Matches(none, none, np.empty(0, np.int32))
    parts: list[Matches] = []
    for left in images.collections:
        for right in collections:
            for rows, of_rows, millionths in numbered_pairs(inputs, step, images, of.rows, left, right, threshold):
                if usable is not None:
                    keep = usable[of_rows]
                    rows, of_rows, millionths = rows[keep], of_rows[keep], millionths[keep]
                parts.append(Matches(rows, of_rows, millionths))
                if sum(len(part.rows) for part in parts) > _PENDING:
                    best, parts = _best([best, *parts], of.ranks), []
    return _best([best, *parts], of.ranks)


def numbered_pairs(
    inputs: ReduceInputs, step: str, images: Numbered, of: Numbered, left: str, right: str, threshold: float
) -> Iterator[tuple[Rows, Rows, npt.NDArray[np.int32]]]:
    """Yield left rows, right rows and millionths of the pairs above a threshold, batch by batch."""
    left_first, right_first = images.first_rows(left), of.first_rows(right)
    for batch in inputs.pairs(step, left, right):
        columns = [column.to_numpy() for column in batch.columns]
        above = columns[4] / PER_UNIT > threshold
        left_shard, left_row, right_shard, right_row, millionths = (column[above] for column in columns)
        yield left_first[left_shard] + left_row, right_first[right_shard] + right_row, millionths


def _best(parts: Iterable[Matches], ranks: Rows) -> Matches:
    found = list(parts)
    rows, of = (np.concatenate([getattr(part, name) for part in found]) for name in ("rows", "of"))
    millionths = np.concatenate([part.millionths for part in found])
    order = np.lexsort((ranks[of], -millionths, rows))
    different, first = np.unique(rows[order], return_index=True)
    return Matches(different, of[order[first]], millionths[order[first]])


def cosines(images: Numbered, rows_N: Rows, of: Numbered, of_rows_N: Rows, scratch: Path) -> Similarities:
    """Return the exact rounded cosine of each ascending row with a row of ``of``, (N,).

    Descriptors of ``of_rows`` wait in a scratch file; shards of ``images`` are read one at a time.
    """
    different, place = np.unique(of_rows_N, return_inverse=True)
    path = scratch / "targets.f16"
    path.unlink(missing_ok=True)
    targets = of.descriptors(different, np.arange(len(different)), path)
    result = np.empty(len(rows_N), np.float64)
    for view, mine, rows in images.parts(rows_N):
        vectors_MD = matrix(view.read(schema.SSCD).column(0), rows)
        of_mine, out = place[mine], result[mine]
        for start, stop in blocks(len(rows), _BLOCK_ROWS):
            pairs = np.arange(stop - start)
            left_BD, right_BD = widen(vectors_MD[start:stop]), widen(targets[of_mine[start:stop]])
            out[start:stop] = pair_similarities(left_BD, right_BD, pairs, pairs)
    return result
