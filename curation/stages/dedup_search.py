"""How near-duplicates are searched: chosen and fitted once, then a code for each descriptor.

``dedup_fit`` decides for a run whether all pairs are compared or an inverted file preselects them, and fits the latter
on a sample. Later input is searched with the same artefact, so a run that grew equals one made at once.

``dedup_codes`` says of every row whether it takes part (no earlier verdict rejects it, and it has a descriptor that is
finite and not all zeros), and holds what the approximate search compares before it looks at descriptors. What is
searched depends on this table alone: a verdict that moves without changing which rows take part makes no search again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.dedup import DedupConfig
from curation.errors import DimensionError
from curation.indexes.pairs import Codes, ExactPairs, InvertedPairs, PairSearch
from curation.indexes.sampling import HashSample
from curation.indexes.vectors import blocks, widen
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.vectors import of_shard, usable

SEARCH_FILE = "search.json"  # which backend, and what it looks like
INDEX_FILE = "index.npz"  # what it was fitted to; empty for the exact one
_BLOCK_ROWS = 4096


class DedupFit:
    """Choose a backend, and fit it if it needs that."""

    name: ClassVar[str] = "dedup_fit"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.SSCD)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (SEARCH_FILE, INDEX_FILE)

    def __init__(self, config: DedupConfig, seed: int, num_threads: int = 1) -> None:
        self.config = config
        self.seed = seed
        self.num_threads = num_threads

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the artefacts; yields nothing."""
        num_rows = sum(int(view.kept.sum()) for view in inputs.shards("pool"))
        is_exact = self.config.backend == "exact" or (
            self.config.backend == "auto" and num_rows <= self.config.exact_max_rows
        )
        search = None if is_exact else self._fitted(inputs, num_rows)
        if search is None:
            np.savez(scratch / INDEX_FILE)
        else:
            search.save(scratch / INDEX_FILE)
        # Nothing of the data: two exact searches are the same artefact, and what used the first one stays fresh.
        found = {"backend": "exact"} if search is None else {"backend": "inverted", **search.describe()}
        (scratch / SEARCH_FILE).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        yield from ()

    def _fitted(self, inputs: ReduceInputs, num_rows: int) -> InvertedPairs | None:
        """Return a fitted search, or None where there is nothing to fit it on."""
        sample = HashSample(self.seed, self.config.sample_size)
        for view in inputs.shards("pool"):
            vectors_ND, keys_N2, _ = of_shard(view, schema.SSCD)
            if len(vectors_ND):
                sample.add(keys_N2, vectors_ND)
        vectors_SD = sample.result().rows
        if not len(vectors_SD):
            return None
        floors = (self.config.edge_floor, self.config.reference_floor)
        at_a_time = min(num_rows, self.config.block_rows)
        return InvertedPairs.fit(vectors_SD, at_a_time, floors, self.config.recall, self.seed, self.num_threads)


class DedupCodes:
    """Which rows of a shard are searched, and their codes."""

    name: ClassVar[str] = "dedup_codes"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.SSCD,)
    writes: Table = schema.DEDUP_CODES

    def __init__(self, search: PairSearch, num_threads: int = 1) -> None:
        self.search = search
        self.num_threads = num_threads

    def __call__(self, columns: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Table:
        """Return ``schema.DEDUP_CODES`` of a shard.

        Raises:
            VectorError: A descriptor is not L2-normalised.
        """
        vectors_ND, rows = usable(columns.column(schema.SSCD_DESCRIPTOR.name), kept, schema.SSCD.name)
        for start, stop in blocks(len(vectors_ND), _BLOCK_ROWS):
            widen(vectors_ND[start:stop], first_row=start)
        codes = self.search.encode(vectors_ND, self.num_threads)
        searched = np.zeros(columns.num_rows, bool)
        searched[rows] = True
        place = np.full(columns.num_rows, -1)
        place[rows] = np.arange(len(rows))
        code = as_binary(codes).take(pa.array(place, mask=place < 0))
        return pa.table([pa.array(searched), code], schema=schema.DEDUP_CODES.schema)


def load_search(folder: Path) -> PairSearch:
    """Return the search that ``dedup_fit`` left in a folder."""
    found = json.loads((folder / SEARCH_FILE).read_text(encoding="utf-8"))
    return ExactPairs() if found["backend"] == "exact" else InvertedPairs.load(folder / INDEX_FILE)


def as_binary(codes_NW: Codes) -> pa.Array:
    """Return codes as a column of N binary values of W bytes."""
    num_rows, width = codes_NW.shape
    offsets = np.arange(num_rows + 1, dtype=np.int32) * np.int32(width)
    data = np.ascontiguousarray(codes_NW)
    return pa.Array.from_buffers(pa.binary(), num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def as_codes(column: pa.Array) -> Codes:
    """Return a column of N binary values, none null, as codes (N, W).

    Raises:
        DimensionError: They are not all of one length.
    """
    num_rows = len(column)
    if not num_rows:
        return np.empty((0, 0), np.uint8)
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + num_rows + 1]
    width = int(bounds[1] - bounds[0])
    if (np.diff(bounds) != width).any():
        raise DimensionError("codes of one shard have different lengths; `--redo dedup` makes them again")
    if not width:
        return np.empty((num_rows, 0), np.uint8)
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]].reshape(num_rows, width)
