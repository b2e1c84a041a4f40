"""What a stage is. A stage knows neither who runs it nor where data lies.

Four shapes, by what they look at:

- ``ImageStage``: decoded images of one shard. ``prepare`` turns one image into what the model eats and runs in a decode
  thread; the call runs on a batch. Several image stages share one read and one decode of a shard.
- ``MapStage``: row-aligned tables of one shard in, one row-aligned table out.
- ``BlockStage``: two groups of shards in, pairs of their rows out: how what is quadratic is cut into tasks.
- ``ReduceStage``: all shards of a run in, row-aligned tables and artefacts out, in bounded memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.schema import Table


@dataclass(frozen=True)
class ImageRow:
    """One image of a shard as an image stage sees it.

    Attributes:
        row: Zero-based row in the shard.
        image_id: See ``schema.IMAGE_ID``.
        data: Encoded bytes.
        rgb_HW3: Decoded pixels, uint8, upright.
        collection: What the shard belongs to.
    """

    row: int
    image_id: str
    data: bytes
    rgb_HW3: npt.NDArray[np.uint8]
    collection: str = "pool"


class ImageStage(Protocol):
    """Features of single images."""

    name: ClassVar[str]
    version: ClassVar[int]  # raise when the output for the same input changes
    writes: Table
    batch_size: int
    min_side_px: int | None  # short side that it resizes images to; None: it needs all pixels

    def prepare(self, image: ImageRow) -> Any:
        """Return what one image contributes to a batch; called from several threads."""

    def __call__(self, batch: Sequence[Any]) -> Mapping[str, Sequence[Any] | npt.NDArray[Any] | pa.Array]:
        """Return the columns of ``writes`` for a batch of at most ``batch_size`` prepared images."""


class MapStage(Protocol):
    """One row-aligned table from others of the same shard."""

    name: ClassVar[str]
    version: ClassVar[int]
    reads: tuple[Table, ...]
    writes: Table

    def __call__(self, columns: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Table:
        """Return ``writes`` for one shard.

        Args:
            columns: The columns of ``reads`` side by side; clashing names are prefixed with ``<table>.``.
            kept: Rows that no earlier verdict rejected.
        """


@dataclass(frozen=True)
class ShardView:
    """One shard of one collection as a reduce sees it; nothing is read before it is asked for.

    Attributes:
        collection: ``pool``, ``seeds/<name>`` or ``references/<name>``.
        shard: Zero-based number.
        num_rows: Rows of the shard.
        keep: Returns ``kept``.
        read: Returns a table, or some of its columns.
        images: Yields ``(row, encoded bytes)`` for the rows asked for.
        tar: Path of the blurred tar relative to the run; empty if there is none.
        is_retry: Whether each row tries one of an earlier shard again, see ``schema.RETRY``.
    """

    collection: str
    shard: int
    num_rows: int
    keep: Callable[[], npt.NDArray[np.bool_]] = field(repr=False)
    read: Callable[..., pa.Table] = field(repr=False)
    images: Callable[[npt.NDArray[np.int64]], Iterator[tuple[int, bytes]]] = field(repr=False)
    tar: str = ""
    is_retry: bool = False

    @cached_property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which rows no earlier verdict rejects, shape (num_rows,)."""
        return self.keep()


class BlockStage(Protocol):
    """Pairs of rows of two groups of shards."""

    name: ClassVar[str]
    version: ClassVar[int]
    reads: tuple[Table, ...]
    writes: pa.Schema

    def __call__(
        self, left: Sequence[ShardView], right: Sequence[ShardView] | None, scratch: Path
    ) -> Iterator[pa.Table]:
        """Yield tables of pairs, of ``writes``; empty ones too, so that work without a result can be stopped.

        Args:
            left: Shards of one collection.
            right: Shards of one collection; None: ``left`` with itself, each pair once.
            scratch: An empty folder of this machine.
        """


class ReduceInputs(Protocol):
    """All shards of a run, and its fitted artefacts."""

    def shards(self, collection: str) -> Iterator[ShardView]:
        """Yield the shards of ``pool``, ``seeds/<name>`` or ``references/<name>`` in order."""

    def collections(self, kind: str) -> list[str]:
        """Return the collections of a kind (``pool``, ``seeds``, ``references``), sorted."""

    def pairs(self, step: str, left: str, right: str) -> Iterator[pa.RecordBatch]:
        """Yield what a block stage found between two collections, in bounded batches."""

    def artefacts(self, step: str) -> Path:
        """Return a folder with the files that an earlier step made."""


class ReduceStage(Protocol):
    """Row-aligned tables, artefacts, or both, from all shards."""

    name: ClassVar[str]
    version: ClassVar[int]
    reads: tuple[Table, ...]
    writes: Table | None
    artefacts: tuple[str, ...]

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield ``(collection, shard, table)`` for every shard, and leave artefacts in ``scratch`` by their names."""
