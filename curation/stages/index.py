"""Index the pool's embeddings for search.

``IndexFit`` chooses the kind of index and trains it, on the images with the smallest hashes of (seed, image id).
``IndexStage`` puts the whole pool into it, in parts that are merged at the end, and measures on images that it was not
trained on how many lists and candidates a search takes.

Memory of the fit: 2 * dim bytes for each image of the sample, up to four times that while the sample is cut down, then
4 * dim bytes more. Of the build: one shard and about 256 MiB of vectors, whatever the size of the pool. Scratch disk:
twice the index, which has 2 * dim + 16 bytes an image and those of its code.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from curation import schema
from curation.config.selection import IndexConfig
from curation.errors import DimensionError
from curation.indexes import index_header
from curation.indexes.flat import FlatIndex
from curation.indexes.index import Index, load, train
from curation.indexes.index_header import HEADER_FILE, KEYS_FILE, LISTS_FILE, VECTORS_FILE
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.keys import Keys
from curation.indexes.parameters import choose
from curation.indexes.preselect import threads
from curation.indexes.sampling import HashSample
from curation.indexes.tuning import NUM_QUERIES, tune
from curation.indexes.vectors import Vectors
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.vectors import of_shard

logger = logging.getLogger(__name__)

# Images that recall is measured on: those with the very smallest hashes, so that none is trained on.
HELD_OUT = NUM_QUERIES


class IndexFit:
    """Choose the index of the pool, and train it."""

    name: ClassVar[str] = "index_fit"
    version: ClassVar[int] = 2
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (HEADER_FILE,)

    def __init__(self, config: IndexConfig, seed: int, num_threads: int = 1) -> None:
        """Take the settings; no result depends on ``num_threads``."""
        self.config = config
        self.seed = seed
        self.num_threads = num_threads

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the header of an empty index in ``scratch``; yield nothing.

        Raises:
            DimensionError: Shards disagree on the dimension.
            VectorError: A vector is not L2-normalised.
        """
        config = self.config
        num_vectors, dim = 0, 1
        for vectors_ND, _ in _vectors(inputs) if config.kind != "flat" else ():
            num_vectors, dim = num_vectors + len(vectors_ND), vectors_ND.shape[1]
        chosen = choose(num_vectors, dim, config.kind, config.num_lists, config.code_bytes)
        logger.info("%d vectors of %d dimensions: %s", num_vectors, dim, chosen)
        sample = HashSample(self.seed, HELD_OUT + chosen.sample_size)
        for vectors_ND, keys_N2 in _vectors(inputs) if chosen.sample_size else ():
            sample.add(keys_N2, vectors_ND)
        rows: Vectors = sample.result().rows.reshape(-1, dim)
        with threads(self.num_threads):
            train(rows[HELD_OUT:] if len(rows) > 2 * HELD_OUT else rows, chosen).save(scratch)
        yield from ()


class IndexStage:
    """Vectors and keys of kept pool images → an index.

    Args:
        config: Settings.
        seed: Of the images that recall is measured on.
        part_bytes: Vectors of about this size are held in memory before they go to disk.
        num_threads: No result depends on it.
    """

    name: ClassVar[str] = "index"
    version: ClassVar[int] = 4
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (VECTORS_FILE, KEYS_FILE, LISTS_FILE, HEADER_FILE)

    def __init__(self, config: IndexConfig, seed: int, part_bytes: int = 1 << 28, num_threads: int = 1) -> None:
        self.config = config
        self.seed = seed
        self.part_bytes = part_bytes
        self.num_threads = num_threads

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the index in ``scratch``; yield nothing.

        Raises:
            DimensionError: Shards disagree on the dimension.
            VectorError: A vector is not L2-normalised.
        """
        with threads(self.num_threads):
            self._build(inputs, scratch)
        yield from ()

    def _build(self, inputs: ReduceInputs, scratch: Path) -> None:
        fitted = index_header.read(inputs.artefacts("index_fit") / HEADER_FILE)
        whole: Index | None = None if fitted.quantizer is None else IvfPqIndex(fitted.quantizer)
        part: Index | None = None
        num_parts = 0
        held_out = HashSample(self.seed, HELD_OUT)
        for vectors_ND, keys_N2 in _vectors(inputs):
            whole = FlatIndex(vectors_ND.shape[1]) if whole is None else whole
            part = whole.empty() if part is None else part  # one without rows is falsy
            part.add(vectors_ND, keys_N2)
            held_out.add(keys_N2, vectors_ND)
            if len(part) * part.dim * 2 >= self.part_bytes:
                whole.merge(_mapped(part, scratch / f"part-{num_parts}"))
                part, num_parts = None, num_parts + 1
        whole = FlatIndex(1) if whole is None else whole
        if part is not None:
            whole.merge(part)
        whole.save(scratch)
        if isinstance(whole, IvfPqIndex):
            self._tune(scratch, held_out)
        else:
            self._warn(whole)
            (scratch / LISTS_FILE).touch()

    def _tune(self, folder: Path, held_out: HashSample) -> None:
        """Measure what a search of a saved index takes, and write it into its header."""
        index, sample, config = IvfPqIndex.load(folder, verify=False), held_out.result(), self.config
        queries_QD: Vectors = sample.rows.reshape(-1, index.dim)
        probing = tune(index, queries_QD, sample.keys, config.recall, config.probes, config.depth)
        header = index_header.read(folder / HEADER_FILE)
        index_header.write(folder / HEADER_FILE, replace(header, probing=probing))

    def _warn(self, index: Index) -> None:
        if self.config.kind == "auto" and choose(len(index), index.dim).kind != "flat":
            logger.warning(
                "the pool has grown to %d vectors, and its index is still flat: exact, but slow to search; "
                "`curate run --stage index --refit` trains one for its size",
                len(index),
            )


def _vectors(inputs: ReduceInputs) -> Iterator[tuple[Vectors, Keys]]:
    dim: int | None = None
    for view in inputs.shards("pool"):
        vectors_ND, keys_N2, _ = of_shard(view, schema.EMBED)
        if dim is not None and vectors_ND.shape[1] != dim:
            raise DimensionError(
                f"embed of {view.collection} shard {view.shard:08d} has {vectors_ND.shape[1]} dimensions, shards "
                f"before it have {dim}"
            )
        dim = vectors_ND.shape[1]
        yield vectors_ND, keys_N2


def _mapped(part: Index, folder: Path) -> Index:
    """Return an index that lies on disk instead of in memory."""
    part.save(folder)
    return load(folder, verify=False)  # checked when it was added
