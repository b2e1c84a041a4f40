"""Pairs of near-duplicates between two groups of shards.

What is quadratic is cut into blocks here: each block reads the descriptors of two groups, searches them, and keeps

- of pool images with each other: every pair above ``edge_floor``. Where that is more than ``max_edges_per_row`` an
  image, a maximum spanning forest of them: it has the components of all of them at every threshold, so that no hub,
  however many copies it has, loses one, and 10^5 copies of one image are 10^5 edges and not 5 * 10^9;
- of pool images with seeds: every pair above ``edge_floor`` (which seeds count is known later);
- of pool images and seeds with references: the most similar reference of each image above ``reference_floor``.

Memory of a block of N and M rows: 2 * dim bytes and a code a row (mapped from scratch files, so they may be paged out),
8 bytes a row, and for a forest about 80 bytes a row. Scratch disk: the same vectors, and up to 12 * max_edges_per_row
bytes a row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.dedup import DedupConfig
from curation.errors import DimensionError
from curation.indexes.exact import Edges
from curation.indexes.forest import SpanningForest
from curation.indexes.keys import keys_from_hex
from curation.indexes.pairs import Codes, PairSearch
from curation.indexes.vectors import PER_UNIT, Vectors, blocks
from curation.schema import Table
from curation.stage import ShardView
from curation.stages.dedup_search import as_codes
from curation.stages.vectors import matrix

Numbers = npt.NDArray[np.int32]

_TABLE_ROWS = 1 << 20
_COPIED_ROWS = 1 << 16
_EDGE = np.dtype([("left", np.int32), ("right", np.int32), ("millionths", np.int32)])


@dataclass(frozen=True)
class _Group:
    """N searched rows of consecutive shards."""

    vectors: Vectors
    codes: Codes
    shards: Numbers  # (N,)
    rows: Numbers  # (N,)
    views: tuple[ShardView, ...]

    def __len__(self) -> int:
        return len(self.rows)


class DedupEdges:
    """The search of one block."""

    name: ClassVar[str] = "dedup_edges"
    version: ClassVar[int] = 2
    reads: tuple[Table, ...] = (schema.FETCH, schema.SSCD, schema.DEDUP_CODES)
    writes: pa.Schema = schema.EDGES

    def __init__(self, config: DedupConfig, search: PairSearch, num_threads: int = 1) -> None:
        self.config = config
        self.search = search
        self.num_threads = num_threads

    def __call__(
        self, left: Sequence[ShardView], right: Sequence[ShardView] | None, scratch: Path
    ) -> Iterator[pa.Table]:
        """Yield tables of ``schema.EDGES``; empty ones while the search has nothing to say.

        Raises:
            DimensionError: Descriptors of different dimensions.
        """
        ours = _gather(left, scratch / "left")
        theirs = ours if right is None else _gather(right, scratch / "right")
        if not len(ours) or not len(theirs):
            return
        if ours.vectors.shape[1] != theirs.vectors.shape[1]:
            raise DimensionError(
                f"descriptors of {left[0].collection} have {ours.vectors.shape[1]} dimensions, those of "
                f"{theirs.views[0].collection} have {theirs.vectors.shape[1]}; `--redo sscd` makes them again"
            )
        kind = theirs.views[0].collection.partition("/")[0]
        floor = self.config.reference_floor if kind == "references" else self.config.edge_floor
        if kind != "pool":
            theirs = _by_id(theirs, scratch / "right-by-id")
        if right is None:
            found = self.search.self_pairs(ours.vectors, ours.codes, floor, self.num_threads)
            limit = self.config.max_edges_per_row * len(ours)
            edges = _forest_of_many(found, len(ours), 0, limit, scratch / "edges")
        else:
            found = self.search.cross_pairs(
                ours.vectors, ours.codes, theirs.vectors, theirs.codes, floor, self.num_threads
            )
            if kind == "references":
                edges = _best_of_each(found, len(ours))
            elif kind == "pool":
                limit = self.config.max_edges_per_row * (len(ours) + len(theirs))
                edges = _forest_of_many(found, len(ours) + len(theirs), len(ours), limit, scratch / "edges")
            else:
                edges = _best_few_of_each(found, len(ours), self.config.max_edges_per_row)
        for left_E, right_E, millionths_E in edges:
            columns = (ours.shards[left_E], ours.rows[left_E], theirs.shards[right_E], theirs.rows[right_E])
            yield pa.table([*columns, millionths_E], schema=schema.EDGES)


_Found = tuple[Numbers, Numbers, Numbers]


def _whole(edges: Edges) -> _Found:
    millionths = np.rint(edges.similarity * PER_UNIT).astype(np.int32)
    return edges.left.astype(np.int32), edges.right.astype(np.int32), millionths


def _nothing() -> _Found:
    return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32)


def _best_few_of_each(found: Iterator[Edges], num_rows: int, few: int) -> Iterator[_Found]:
    """Yield the ``few`` most similar right rows of each left row; of equally similar ones the first."""
    kept, num_edges = [_nothing()], 0
    for edges in found:
        kept.append(_whole(edges))
        num_edges += len(edges.left)
        if num_edges > 2 * few * num_rows + _TABLE_ROWS:
            kept = [_few_of_each(kept, few)]
            num_edges = len(kept[0][0])
        yield _nothing()
    yield _few_of_each(kept, few)


def _few_of_each(parts: Sequence[_Found], few: int) -> _Found:
    left_E, right_E, millionths_E = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((right_E, -millionths_E, left_E))
    left_E = left_E[order]
    rank_E = np.arange(len(left_E)) - np.searchsorted(left_E, left_E)
    order = order[rank_E < few]
    return left_E[rank_E < few], right_E[order], millionths_E[order]


def _forest_of_many(found: Iterator[Edges], num_rows: int, shift: int, limit: int, path: Path) -> Iterator[_Found]:
    """Yield all edges if there are at most ``limit``, else a maximum spanning forest of them.

    Args:
        found: Edges.
        num_rows: Rows on both sides.
        shift: What makes the right rows other rows than the left ones; 0 where they are the same.
        limit: Edges that are kept as they are; they wait in a file.
        path: Of that file.
    """
    forest: SpanningForest | None = None
    num_edges = 0
    with path.open("w+b") as waiting:
        for edges in found:
            whole = _whole(edges)
            num_edges += len(edges.left)
            if forest is None:
                _write(waiting.write, whole)
                if num_edges > limit:
                    forest = SpanningForest(num_rows)
                    for left, right, millionths in _read(path, waiting.flush):
                        forest.add(left, right + np.int32(shift), millionths)
            else:
                forest.add(whole[0], whole[1] + np.int32(shift), whole[2])
            yield _nothing()
        if forest is None:
            yield from _read(path, waiting.flush)
            return
    left, right, millionths = forest.edges()
    for start in range(0, len(left), _TABLE_ROWS):
        part = slice(start, start + _TABLE_ROWS)
        lower = np.minimum(left[part], right[part])
        yield lower, np.maximum(left[part], right[part]) - np.int32(shift), millionths[part]


def _write(write: Callable[[bytes], int], edges: _Found) -> None:
    packed = np.empty(len(edges[0]), _EDGE)
    packed["left"], packed["right"], packed["millionths"] = edges
    write(packed.tobytes())


def _read(path: Path, flush: Callable[[], None]) -> Iterator[_Found]:
    flush()
    with path.open("rb") as stream:
        while data := stream.read(_TABLE_ROWS * _EDGE.itemsize):
            packed = np.frombuffer(data, _EDGE)
            yield packed["left"].copy(), packed["right"].copy(), packed["millionths"].copy()


def _best_of_each(found: Iterator[Edges], num_rows: int) -> Iterator[_Found]:
    """Yield the best edge of each left row: the most similar, of equals the one with the smallest right row."""
    best = np.full(num_rows, -1, np.int32)
    highest = np.full(num_rows, -1, np.int32)
    for edges in found:
        left, right, millionths = _whole(edges)
        order = np.lexsort((right, -millionths, left))
        left, first = np.unique(left[order], return_index=True)
        right, millionths = right[order[first]], millionths[order[first]]
        better = millionths > highest[left]
        better |= (millionths == highest[left]) & (right < best[left])
        best[left[better]], highest[left[better]] = right[better], millionths[better]
        yield _nothing()
    (rows,) = np.nonzero(best >= 0)
    for start in range(0, len(rows), _TABLE_ROWS):
        part = rows[start : start + _TABLE_ROWS]
        yield part.astype(np.int32), best[part], highest[part]


def _gather(views: Sequence[ShardView], path: Path) -> _Group:
    """Gather the searched rows of shards into two scratch files."""
    dim, code_bytes = 1, 0
    shards, rows = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    vectors_path, codes_path = path.with_suffix(".f16"), path.with_suffix(".codes")
    with vectors_path.open("wb") as vectors, codes_path.open("wb") as codes:
        for view in views:
            table = view.read(schema.DEDUP_CODES)
            (mine,) = np.nonzero(table.column("searched").to_numpy())
            if not len(mine):
                continue
            vectors_ND = matrix(view.read(schema.SSCD).column(0), mine)
            codes_NW = as_codes(table.column("code").take(pa.array(mine)).combine_chunks())
            shape = (vectors_ND.shape[1], codes_NW.shape[1])
            if len(rows) > 1 and shape != (dim, code_bytes):
                raise DimensionError(
                    f"descriptors of {view.collection} shard {view.shard:08d} have {shape[0]} dimensions, those before "
                    f"it have {dim}; `--redo sscd` makes them again"
                )
            dim, code_bytes = shape
            vectors.write(np.ascontiguousarray(vectors_ND).data)
            codes.write(np.ascontiguousarray(codes_NW).tobytes())
            rows.append(mine.astype(np.int32))
            shards.append(np.full(len(mine), view.shard, np.int32))
    joined = np.concatenate(rows)
    return _Group(
        _mapped(vectors_path, np.float16, (len(joined), dim)),
        _mapped(codes_path, np.uint8, (len(joined), code_bytes)),
        np.concatenate(shards),
        joined,
        tuple(views),
    )


def _by_id(group: _Group, path: Path) -> _Group:
    """Return the rows in the order of their image ids, copied to scratch files.

    A search may answer for all rows of the same content with the first of them: this makes it the smallest id.
    """
    ids: list[str] = []
    for view in group.views:
        mine = group.rows[group.shards == view.shard]
        ids += view.read(schema.FETCH, ["image_id"]).column(0).take(pa.array(mine)).to_pylist()
    keys_N2 = keys_from_hex(ids)
    order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))
    vectors_path, codes_path = path.with_suffix(".f16"), path.with_suffix(".codes")
    with vectors_path.open("wb") as vectors, codes_path.open("wb") as codes:
        for start, stop in blocks(len(order), _COPIED_ROWS):
            vectors.write(group.vectors[order[start:stop]].tobytes())
            codes.write(group.codes[order[start:stop]].tobytes())
    return _Group(
        _mapped(vectors_path, np.float16, group.vectors.shape),
        _mapped(codes_path, np.uint8, group.codes.shape),
        group.shards[order],
        group.rows[order],
        group.views,
    )


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Return an array that lies in a file; one without values cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=shape) if math.prod(shape) else np.empty(shape, dtype)
